"""The conversion, step by step."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from megatron_plugins.arguments import set_features
from megatron_plugins.export.arguments import decoder_config
from megatron_plugins.export.checkpoint import Checkpoint
from megatron_plugins.export.reference_tensors import ReferenceTensors
from megatron_plugins.export.save import check_new, save_release
from torch_plugins import reference
from torch_plugins.config import ConfigError, LadderResidual
from torch_plugins.export.folder import Folder
from torch_plugins.export.layerwise import folder_logits
from torch_plugins.export.proof import Verdict, VerificationError, random_ids, tolerance
from torch_plugins.export.writer import new_folder

from .arguments import arguments
from .tensors import empty_states, megatron_tensors


def progress(text: str) -> None:
    print(f"convert: {text}", file=sys.stderr, flush=True)


def convert(
    kind: str, source: Path, to: Path, ladder: LadderResidual | None = None, verified: bool = True
) -> str:
    """Write the checkpoint folder ``to`` from the Hugging Face folder ``source``.

    Args:
        kind: ``llama``, ``granite``, or ``hf`` for whichever ``source`` is.
        ladder: layers that are to be ladders; the weights stay what they are.
        verified: compare logits, without the ladder, before ``to`` appears.

    Returns:
        What was done and how to go on, for the user.

    Raises:
        ConfigError: an input cannot be used; nothing was written.
        VerificationError: the checkpoint's logits are not the folder's; nothing is left.
    """
    check_new(to)
    to = to.absolute()
    folder = Folder(source, kind)
    try:
        args = arguments(folder.decoder, folder.dtype)
    except ConfigError as error:
        raise ConfigError(f"{source / 'config.json'}: {error}") from error
    layers = ladder.resolve(args.num_layers) if ladder else ()
    if ladder and layers:
        set_features(args, {LadderResidual.key(): ladder})
    tensors = megatron_tensors(folder, args, progress)
    size = sum(math.prod(tensor.shape) for tensor in tensors.values())
    _check_space(to, size * folder.dtype.itemsize)
    with new_folder(to, force=to.exists()) as place:
        written = save_release(place, tensors, empty_states(args.num_layers), args)
        verdict = verify(folder, Checkpoint(written)) if verified else None
        if verdict is not None and not verdict.equal:
            raise VerificationError(f"the checkpoint's logits differ: {verdict}")
    proof = f"logits equal: {verdict}" if verdict else "logits not compared (--no-verify)"
    which = f"ladder in layers {', '.join(map(str, layers))}" if layers else "no ladder"
    return (
        f"{proof}\nconverted {source} to {to}: {folder.config.model_type}, {args.num_layers} "
        f"layers, {size:,} parameters, {which}\n"
        f"start Megatron with {launch_flags(args, source, to)}"
    )


def verify(folder: Folder, checkpoint: Checkpoint) -> Verdict:
    """Logits of transformers on the folder against those of the naive reference on the checkpoint,
    both with one layer in memory; ladders are left out, since the folder has none."""
    plain = Namespace(**vars(checkpoint.args) | {LadderResidual.key(): False})
    config = decoder_config(plain, folder.decoder.vocab_size, "float32")
    ids = random_ids(config)
    progress("computing the logits of transformers")
    expected = folder_logits(folder, ids)
    progress("computing the logits of the naive reference on the checkpoint")
    tensors = ReferenceTensors(checkpoint, config, None)
    found = reference.logits(tensors, config.to_dict(), ids)
    difference = (found - expected).abs().max().item()
    return Verdict(f"transformers on {folder.path}", difference, tolerance(config, expected))


def launch_flags(args: Namespace, source: Path, to: Path) -> str:
    """What a run needs beside its own flags: --use-checkpoint-args restores the rest."""
    words = ["--load", str(to), "--use-checkpoint-args", "--norm-epsilon"]
    words.append(str(args.layernorm_epsilon))
    words += ["--make-vocab-size-divisible-by", str(args.make_vocab_size_divisible_by)]
    words += ["--use-rope-scaling"] if args.use_rope_scaling else []
    words += ["--bf16"] if args.bf16 else ["--fp16"] if args.fp16 else []
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(source)]
    return shlex.join(words)


def _check_space(to: Path, needed: int) -> None:
    free = shutil.disk_usage(to.parent).free
    if free < needed:
        raise ConfigError(
            f"--to {to}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        )
