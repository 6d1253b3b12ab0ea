"""The written folder, as a user loads it, against the trained model: same logits or no export."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_plugins import reference

from . import folder_model
from .checkpoint import Checkpoint
from .reference_tensors import ReferenceTensors

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig

Say = Callable[[str], None]
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


def verify(
    folder: Path,
    checkpoint: Checkpoint,
    config: PluginDecoderConfig,
    dtype: torch.dtype | None,
    say: Say,
) -> Verdict:
    """Compare the logits of the folder with the trained model's.

    The trained model is Megatron's own, loaded by Megatron from the checkpoint, where that runs on
    this machine; else the naive reference on the checkpoint's tensors.

    Args:
        dtype: weights were rounded to it; the trained model's are too, before the comparison.
    """
    input_ids = random_ids(config)
    expected, against = megatron_logits(checkpoint, config, input_ids, dtype, say)
    if expected is None:
        say("computing the logits of the naive reference")
        tensors = ReferenceTensors(checkpoint, config, dtype)
        expected = reference.logits(tensors, config.to_dict(), input_ids)
        against = "the naive reference on the checkpoint's tensors"
    say("computing the logits of the written folder")
    found = folder_logits(folder, input_ids)
    difference = (found - expected).abs().max().item()
    return Verdict(against, difference, tolerance(config, expected))


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


def folder_logits(folder: Path, input_ids: Tensor) -> Tensor:
    """fp32 logits of a folder; one that carries code runs it, in a process without our package's.

    Raises:
        VerificationError: the folder does not load, or not completely.
    """
    if "auto_map" not in json.loads((folder / "config.json").read_text()):
        try:
            return folder_model.logits(folder, input_ids)
        except ValueError as error:
            raise VerificationError(f"the written folder is not whole: {error}") from error
    with tempfile.TemporaryDirectory() as place:
        ids, answer = Path(place) / "ids.pt", Path(place) / "logits.pt"
        torch.save(input_ids, ids)
        done = _python("folder_model", folder, ids, answer, HF_MODULES_CACHE=place)
        if done.returncode:
            raise VerificationError(f"the written folder does not load: {_last_line(done)}")
        loaded: Tensor = torch.load(answer, weights_only=True)
        return loaded


def megatron_logits(
    checkpoint: Checkpoint,
    config: PluginDecoderConfig,
    input_ids: Tensor,
    dtype: torch.dtype | None,
    say: Say,
) -> tuple[Tensor | None, str]:
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
            say(f"Megatron's model does not run here: {_last_line(done)}")
            return None, ""
        result = torch.load(answer, weights_only=True)
        return result["logits"], str(result["against"])


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
    return _python("megatron_model", *request_files)


def _python(module: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this package alone, whatever launcher this process runs under."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return subprocess.run(
        [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=inherited | environment,
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


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
