"""The export, step by step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_plugins import reference
from torch_plugins.config import ConfigError
from torch_plugins.export.proof import (
    Verdict,
    VerificationError,
    check_quantized,
    folder_logits,
    random_ids,
    tolerance,
    with_all_experts,
)
from torch_plugins.export.tokenizer import Tokenizer
from torch_plugins.export.writer import check_output, check_shard_size, new_folder, write_model
from torch_plugins.w4a4.linear import swap
from torch_plugins.w4a4.marker import SECTION, is_marker, marker, read

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
    """Compare the logits of the folder with the reference's on the checkpoint's tensors; of a model
    with W4A4 twice, tightly without the quantization of its inputs."""
    input_ids, fields = random_ids(config), with_all_experts(config)
    wide = {name: tensors[name].float() for name in tensors}
    against = "the naive reference on the checkpoint's tensors"
    with torch.no_grad():
        plain = reference.logits(*_unquantized(wide, fields), input_ids)
    found = folder_logits(folder, input_ids, all_experts=True, quantized=False)
    difference = (found - plain).abs().max().item()
    if is_marker(fields.get(SECTION)):
        with torch.no_grad():
            wanted = reference.logits(wide, fields, input_ids)
        found = folder_logits(folder, input_ids, all_experts=True)
        against = f"{against}; {check_quantized(found, wanted, plain)}"
    return Verdict(against, difference, tolerance(config, plain))


def _unquantized(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """What the reference is to be given so that the inputs of linear layers stay as they are."""
    section = fields.get(SECTION)
    if not is_marker(section):
        return tensors, fields
    feature, modules = read(section)
    kept = {name: tensor for name, tensor in tensors.items() if ".input_quantizer." not in name}
    weights = replace(feature, activation_bits=0) if feature.weight_bits else None
    return kept, {**fields, SECTION: weights and marker(weights, modules)}
