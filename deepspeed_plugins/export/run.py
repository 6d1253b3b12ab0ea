"""The export, step by step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torch_plugins import reference
from torch_plugins.config import ConfigError
from torch_plugins.export.proof import (
    Verdict,
    VerificationError,
    folder_logits,
    random_ids,
    tolerance,
    with_all_experts,
)
from torch_plugins.export.tokenizer import Tokenizer
from torch_plugins.export.writer import check_output, check_shard_size, new_folder, write_model
from torch_plugins.w4a4.linear import swap
from torch_plugins.w4a4.marker import SECTION, is_marker, read

from .checkpoint import Checkpoint, Weights

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def progress(text: str) -> None:
    print(f"export: {text}", file=sys.stderr, flush=True)


def export(
    load: Path,
    output: Path,
    tag: str | None = None,
    tokenizer: Path | None = None,
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    force: bool = False,
) -> tuple[str, Verdict]:
    """Write ``output`` from the checkpoint in ``load`` and prove it.

    Args:
        load: the folder of ``engine.save_checkpoint``, or that of one tag in it.
        output: the folder to make.
        tag: of the checkpoint; default: the latest.
        tokenizer: a folder or ``tokenizer.json`` to copy.
        dtype: of the weights: ``keep`` (as trained), ``bf16``, ``fp16`` or ``fp32``.
        max_shard_size: of one weight file.
        force: replace an ``output`` that is there.

    Returns:
        The ``model_type`` written, and the comparison of logits.

    Raises:
        ConfigError: an input cannot be used; nothing was written.
        VerificationError: what was written does not load, or its logits differ; nothing is left.
    """
    from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM

    load, output = load.absolute(), output.absolute()
    check_output(output, force)
    check_shard_size(max_shard_size)
    checkpoint = Checkpoint(load, tag)
    progress(f"read {checkpoint.folder}")
    files = Tokenizer.load(tokenizer)
    config = PluginDecoderConfig.from_dict(checkpoint.config)
    if files.size is not None and files.size > config.vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer}: {files.size} tokens, but the model has {config.vocab_size}"
        )
    config.dtype = DTYPES.get(dtype, config.dtype)
    section = getattr(config, SECTION, None)
    with torch.device("meta"):
        model = PluginDecoderForCausalLM(config)
        if is_marker(section):
            feature, modules = read(section)
            swap(model, replace(feature, modules="*"), modules)
            model.config.quantization_config = section
    expected = dict(model.named_parameters())  # a tied head is named once
    tensors = Weights(checkpoint.weights(expected), expected, config.dtype)
    with new_folder(output, force) as folder:
        model_type = write_model(folder, config, tensors, files, max_shard_size, progress)
        progress("comparing logits of the written folder and the naive reference")
        verdict = verify(folder, config, tensors)
        if not verdict.equal:
            raise VerificationError(f"the exported model's logits differ: {verdict}")
    return model_type, verdict


def verify(folder: Path, config: PluginDecoderConfig, tensors: Weights) -> Verdict:
    """Compare the logits of the folder with the reference's on the checkpoint's tensors."""
    input_ids = random_ids(config)
    wide = {name: tensors[name].float() for name in tensors}
    with torch.no_grad():
        wanted = reference.logits(wide, with_all_experts(config), input_ids)
    difference = (folder_logits(folder, input_ids, all_experts=True) - wanted).abs().max().item()
    against = "the naive reference on the checkpoint's tensors"
    return Verdict(against, difference, tolerance(config, wanted))
