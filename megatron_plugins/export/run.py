"""The export, step by step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from torch_plugins.config import ConfigError
from torch_plugins.export.proof import Verdict, VerificationError
from torch_plugins.export.writer import check_output, check_shard_size, new_folder, write_model

from .arguments import decoder_config, refuse_inexpressible
from .checkpoint import Checkpoint, find_iteration
from .mapping import HFTensors
from .tokenizer import Tokenizer, vocabulary
from .verify import verify

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMBEDDING = "embedding.word_embeddings.weight"


def progress(text: str) -> None:
    print(f"export: {text}", file=sys.stderr, flush=True)


def export(
    load: Path,
    output: Path,
    tokenizer: Path | None = None,
    iteration: int | None = None,
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    force: bool = False,
    without: Sequence[str] = (),
) -> tuple[str, Verdict]:
    """Write ``output`` from the checkpoint in ``load`` and prove it.

    Args:
        load: Megatron's ``--save`` folder, or one ``iter_`` folder.
        output: the folder to make.
        tokenizer: a folder or ``tokenizer.json`` to copy; its size is that of the vocabulary.
        iteration: default: the latest.
        dtype: of the weights: ``keep``, ``bf16``, ``fp16`` or ``fp32``.
        max_shard_size: of one weight file.
        force: replace an ``output`` that is there.
        without: keys of features to leave out: the weights as a model without them.

    Returns:
        The ``model_type`` written, and the comparison of logits.

    Raises:
        ConfigError: an input cannot be used; nothing was written.
        VerificationError: what was written does not load, or its logits differ; nothing is left.
    """
    load, output = load.absolute(), output.absolute()
    check_output(output, force)
    check_shard_size(max_shard_size)
    checkpoint = Checkpoint(find_iteration(load, iteration))
    progress(f"read the arguments of {checkpoint.folder}")
    for key in without:
        setattr(checkpoint.args, key, False)
    refuse_inexpressible(checkpoint.args)
    if EMBEDDING not in checkpoint.tensors:
        raise ConfigError(f"{checkpoint.folder}: no {EMBEDDING}; only GPT models are exported")
    files = Tokenizer.load(tokenizer)
    padded = checkpoint.tensors[EMBEDDING][0]
    size, source = vocabulary(checkpoint.args, padded, files)
    progress(f"vocabulary: {size} of {padded} rows ({source})")
    kept = DTYPES[dtype] or checkpoint.dtype(EMBEDDING)
    config = decoder_config(checkpoint.args, size, str(kept).removeprefix("torch."))
    if config.desync is not None:
        progress(
            f"{config.desync.title}: the function of {config.desync.ranks} tensor-parallel ranks, "
            "which one process computes; config.json says so, and no other number of ranks has it"
        )
    tensors = HFTensors(checkpoint, config, DTYPES[dtype])
    with new_folder(output, force) as folder:
        model_type = write_model(folder, config, tensors, files, max_shard_size, progress)
        verdict = verify(folder, checkpoint, config, DTYPES[dtype], progress)
        if not verdict.equal:
            raise VerificationError(f"the exported model's logits differ: {verdict}")
    return model_type, verdict
