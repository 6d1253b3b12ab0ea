"""A checkpoint of DeepSpeed: configuration and whole weights of the decoder in it.

DeepSpeed's own consolidation unpickles freely. So every file is read through an allow-list first: a
name outside it is an error, and nothing of the file is ever called.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed_plugins.checkpoints import RECORD
from torch_plugins.config import ConfigError


class Checkpoint:
    """The newest or named checkpoint in a folder of ``engine.save_checkpoint``.

    Args:
        folder: what was given to ``save_checkpoint``, or the folder of one tag in it.
        tag: of one checkpoint; default: what the file ``latest`` names.

    Raises:
        ConfigError: there is none, it has no decoder in it, or a file holds more than tensors and
            numbers.
    """

    def __init__(self, folder: Path, tag: str | None = None) -> None:
        models = model_files(folder, tag)
        self.folder = models[0].parent
        self.optimizers = sorted(self.folder.glob("*_optim_states.pt"))
        self._states = [read(model) for model in models]
        for file in self.optimizers:
            read(file)
        state = self._states[0]
        record = state.get(RECORD)
        if record is None:
            raise ConfigError(
                f"{self.folder}: no model of the plugins in it ({models[0].name} has no {RECORD}); "
                "a stock model is exported by DeepSpeed's zero_to_fp32.py"
            )
        self.config: dict[str, Any] = record
        self._ranks = int(state.get("mp_world_size") or 1)
        if self._ranks > 1 and models[0].name.startswith("zero_pp_rank"):
            raise ConfigError(
                f"{self.folder}: ZeRO 3 has cut what tensor parallelism over {self._ranks} ranks "
                "had cut; gather it where it trains, by Trainer.save_model or "
                "engine.save_16bit_model"
            )

    def weights(self, expected: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """By Hugging Face name: a tensor, or what becomes one by ``contiguous()``; fp32 where ZeRO
        keeps fp32 weights, else as trained, and as trained if tensor parallelism cut them.

        Args:
            expected: the whole tensors, without memory.

        Raises:
            ConfigError: DeepSpeed cannot consolidate the files.
        """
        if self._ranks > 1:
            ranks = [state["module"] for state in self._states]
            return {
                name: Shards(name, [rank[name] for rank in ranks], expected[name].shape)
                for name in expected
                if all(name in rank for rank in ranks)
            }
        if not self.optimizers:  # ZeRO 0 keeps whole weights
            return dict(self._states[0]["module"])
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(sys.stderr):
            try:
                found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
                    str(self.folder.parent), self.folder.name, lazy_mode=True
                )
            except (ValueError, OSError, KeyError) as error:
                raise ConfigError(f"{self.folder}: DeepSpeed says {error}") from error
        return found


@dataclass(frozen=True)
class Shards:
    """A tensor that tensor parallelism has cut along one dimension, or left whole."""

    name: str
    parts: list[Tensor]
    """By rank."""
    shape: torch.Size
    """Of the whole."""

    def contiguous(self) -> Tensor:
        """The whole tensor.

        Raises:
            ConfigError: the parts do not make one, or ranks differ in a tensor that was not cut.
        """
        first = self.parts[0]
        if first.shape == self.shape and all(map(first.equal, self.parts)):
            return first.contiguous()
        cut = [dim for dim, size in enumerate(first.shape) if size != self.shape[dim]]
        whole = torch.cat(self.parts, cut[0]) if len(cut) == 1 else None
        if whole is None or whole.shape != self.shape:
            found = [tuple(part.shape) for part in self.parts]
            raise ConfigError(
                f"{self.name} of the ranks, {found}, is no tensor {tuple(self.shape)} cut once"
            )
        return whole


class Weights:
    """The tensors of ``config`` in a dtype, each made when asked for.

    Raises:
        ConfigError: names the tensors that are missing.
    """

    def __init__(
        self, found: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        missing = sorted(expected.keys() - found.keys())
        if missing:
            remedy = "was it saved with exclude_frozen_parameters? Save it without"
            if any(name.startswith("base_model.model.") for name in found):
                remedy = "it holds PEFT's adapters; merge them, by merge_and_unload, and save that"
            raise ConfigError(f"the checkpoint lacks {', '.join(missing[:4])}: {remedy}")
        self._found, self._expected, self._dtype = found, expected, dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._expected)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._found[name].contiguous().to(self._dtype)
        return tensor

    def meta(self, name: str) -> Tensor:
        """The tensor without memory."""
        return self._expected[name].to(self._dtype)


def model_files(folder: Path, tag: str | None) -> list[Path]:
    """Those of the newest or named checkpoint in ``folder``, or of ``folder`` itself.

    Raises:
        ConfigError: there is none.
    """
    found = _find(folder, tag)
    models = sorted(found.glob("*_model_states.pt"))
    if not models:
        raise ConfigError(f"{found}: no *_model_states.pt of DeepSpeed in it")
    return models


def read(file: Path) -> dict[str, Any]:
    """Content of a ``.pt`` file, its tensors mapped and not read.

    Raises:
        ConfigError: it names a class outside the allow-list, or is damaged.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        lines = str(error).splitlines()
        reason = next((line for line in lines if "GLOBAL" in line), str(error)).strip()
        raise ConfigError(
            f"{file}: refused, it holds more than tensors and numbers: {reason}"
        ) from error
    if not isinstance(state, dict):
        raise ConfigError(f"{file}: refused, it holds a {type(state).__name__}, not a state")
    return state


def _find(folder: Path, tag: str | None) -> Path:
    if tag is None and any(folder.glob("*_model_states.pt")):
        return folder
    latest = folder / "latest"
    if tag is None and not latest.is_file():
        raise ConfigError(
            f"{folder}: no file 'latest' and no *_model_states.pt; give the folder of "
            "save_checkpoint, or --tag"
        )
    found = folder / (latest.read_text().strip() if tag is None else tag)
    if not found.is_dir():
        raise ConfigError(f"{found}: no such checkpoint")
    return found
