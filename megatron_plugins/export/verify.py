"""The written folder, as a user loads it, against the trained model: same logits or no export."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_plugins import reference
from torch_plugins.export.proof import (
    SECONDS,
    Verdict,
    check_quantized,
    folder_logits,
    last_line,
    random_ids,
    run_module,
    tolerance,
    with_all_experts,
)
from torch_plugins.w4a4.marker import SECTION, marker, read

from .checkpoint import Checkpoint
from .reference_tensors import ReferenceTensors

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig

Say = Callable[[str], None]
Expected = tuple[Tensor, Tensor | None]
"""Logits with plain inputs of linear layers, and with quantized ones where W4A4 has them."""


def verify(
    folder: Path,
    checkpoint: Checkpoint,
    config: PluginDecoderConfig,
    dtype: torch.dtype | None,
    say: Say,
) -> Verdict:
    """Compare the logits of the folder with the trained model's.

    The trained model is Megatron's own, loaded by Megatron from the checkpoint, where that runs on
    this machine; else the naive reference on the checkpoint's tensors. All experts are computed,
    whatever inference keeps: nearly equal scores could be chosen differently. For the same reason
    W4A4's models are compared twice, tightly without the quantization of their inputs.

    Args:
        dtype: weights were rounded to it; the trained model's are too, before the comparison.
    """
    input_ids = random_ids(config)
    expected, against = megatron_logits(checkpoint, config, input_ids, dtype, say)
    if expected is None:
        say("computing the logits of the naive reference")
        expected = reference_logits(checkpoint, config, input_ids, dtype)
        against = "the naive reference on the checkpoint's tensors"
    plain, quantized = expected
    say("computing the logits of the written folder")
    found = folder_logits(folder, input_ids, all_experts=True, quantized=False)
    difference = (found - plain).abs().max().item()
    if quantized is not None:
        found = folder_logits(folder, input_ids, all_experts=True)
        against = f"{against}; {check_quantized(found, quantized, plain)}"
    return Verdict(against, difference, tolerance(config, plain))


def reference_logits(
    checkpoint: Checkpoint, config: PluginDecoderConfig, input_ids: Tensor, dtype: Any
) -> Expected:
    """Logits of the naive reference on the checkpoint's tensors."""
    tensors, fields = ReferenceTensors(checkpoint, config, dtype), with_all_experts(config)
    section = fields.pop(SECTION, None)
    if section is None:
        return reference.logits(tensors, fields, input_ids), None
    quantized = reference.logits(tensors, {**fields, SECTION: section}, input_ids)
    feature, modules = read(section)
    if not feature.activation_bits:
        return quantized, None
    weights = replace(feature, activation_bits=0) if feature.weight_bits else None
    if weights is not None:
        fields |= {SECTION: marker(weights, modules)}
    return reference.logits(tensors, fields, input_ids), quantized


def megatron_logits(
    checkpoint: Checkpoint,
    config: PluginDecoderConfig,
    input_ids: Tensor,
    dtype: torch.dtype | None,
    say: Say,
) -> tuple[Expected | None, str]:
    """Logits of Megatron's GPTModel in a process of its own, or None where that does not run."""
    if not _installed("megatron.core") or not _installed("megatron.training"):
        say("Megatron is not installed")
        return None, ""
    say("computing the logits of Megatron's own model")
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "logits.pt"
        file = Path(place) / "request.json"
        file.write_text(json.dumps(megatron_request(checkpoint, config, input_ids, dtype, answer)))
        try:
            done = ask_megatron(file)
        except subprocess.TimeoutExpired:
            say(f"Megatron's model did not answer within {SECONDS} s")
            return None, ""
        if done.returncode or not answer.is_file():
            say(f"Megatron's model does not run here: {last_line(done)}")
            return None, ""
        result = torch.load(answer, weights_only=True)
        return (result["logits"], result["quantized"]), str(result["against"])


def megatron_request(
    checkpoint: Checkpoint,
    config: PluginDecoderConfig,
    input_ids: Tensor,
    dtype: torch.dtype | None,
    answer: Path,
) -> dict[str, Any]:
    """What ``megatron_model`` needs to know, as JSON can carry it."""
    return {
        "args": plain_arguments(checkpoint.args),
        "checkpoint": str(checkpoint.folder.resolve()),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "input_ids": input_ids.tolist(),
        "vocab_size": config.vocab_size,
        "padded_vocab_size": checkpoint.tensors["embedding.word_embeddings.weight"][0],
        "logits": str(answer),
    }


def ask_megatron(*request_files: Path) -> subprocess.CompletedProcess[str]:
    """Run ``megatron_model`` on request files."""
    return run_module(f"{__package__}.megatron_model", *request_files)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def plain_arguments(args: Namespace) -> dict[str, Any]:
    """The arguments that JSON can carry."""
    kinds = (str, int, float, list, type(None))
    return {k: v for k, v in vars(args).items() if isinstance(v, kinds) and _json(v)}


def _json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
