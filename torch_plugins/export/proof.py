"""Logits of a written folder, as a user loads it, and how far they may be from the model's."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import folder_model

if TYPE_CHECKING:
    from ..hf import PluginDecoderConfig

SECONDS = 3600
"""Upper limit for building a model and one forward pass."""

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VerificationError(RuntimeError):
    """The written model does not load, or does not compute what was trained."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the comparison, in fp32 on random token ids."""

    against: str
    difference: float
    """Largest absolute difference of two logits; NaN when one is not a number."""
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"max abs difference {self.difference:.3g}, tolerance {self.tolerance:.3g}, "
            f"against {self.against}"
        )


def tolerance(config: PluginDecoderConfig, logits: Tensor) -> float:
    """``8 eps sqrt(L D) max|logits|``: rounding errors of fp32 add up like a random walk over the
    layers ``L`` and the terms ``D`` of each sum."""
    steps = math.sqrt(config.num_hidden_layers * config.hidden_size)
    return 8 * torch.finfo(torch.float32).eps * steps * logits.abs().max().item()


def random_ids(config: PluginDecoderConfig) -> Tensor:
    """Token ids ``[2, S]``, always the same."""
    length = min(64, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


def with_all_experts(config: PluginDecoderConfig) -> dict[str, Any]:
    """The configuration for :func:`torch_plugins.reference.logits` that fits ``folder_logits`` with
    ``all_experts``."""
    everything = copy.copy(config)
    folder_model.choose_all(everything)
    return everything.to_dict()


OF_QUANTIZATION = 0.05
"""Most that two quantized models may differ, as a share of what quantization changes: of two that
differ in the last bit, an input next to the border of two levels is rounded to either."""


def check_quantized(found: Tensor, expected: Tensor, plain: Tensor) -> str:
    """Compare the logits of two quantized models whose weights are known to be equal.

    Args:
        found, expected: the logits of both.
        plain: those without quantization.

    Returns:
        What was found.

    Raises:
        VerificationError: they are too far apart, or not numbers.
    """
    difference = (found - expected).abs().mean().item()
    change = (expected - plain).abs().mean().item()
    told = f"quantized: mean difference {difference:.3g}, quantization changes {change:.3g}"
    if not difference <= OF_QUANTIZATION * change:
        raise VerificationError(f"the exported model's quantized logits differ: {told}")
    return told


def folder_logits(
    folder: Path, input_ids: Tensor, all_experts: bool = False, quantized: bool = True
) -> Tensor:
    """fp32 logits of a folder; one that carries code runs it, in a process without our package's.

    Args:
        all_experts: compute every expert of DS-MoE: a proof of the weights that no choice between
            nearly equal scores can upset.
        quantized: quantize what W4A4 does in the folder's model; off, another proof of the weights.

    Raises:
        VerificationError: the folder does not load, or not completely.
    """
    if "auto_map" not in json.loads((folder / "config.json").read_text()):
        try:
            return folder_model.logits(folder, input_ids, all_experts, quantized)
        except ValueError as error:
            raise VerificationError(f"the written folder is not whole: {error}") from error
    with tempfile.TemporaryDirectory() as place:
        ids, answer = Path(place) / "ids.pt", Path(place) / "logits.pt"
        torch.save(input_ids, ids)
        alone = {"HF_MODULES_CACHE": place, "TORCH_PLUGINS_DISABLE": "1"}
        choice = ["all-experts"] if all_experts else []
        choice += [] if quantized else ["plain"]
        done = run_module(f"{__package__}.folder_model", folder, ids, answer, *choice, **alone)
        if done.returncode:
            raise VerificationError(f"the written folder does not load: {last_line(done)}")
        loaded: Tensor = torch.load(answer, weights_only=True)
        return loaded


def run_module(
    module: str, *arguments: Path | str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of ours alone, whatever launcher this process runs under."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=inherited | environment,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"
