"""The CUDA random generator is the CPU's: dropout and initialization draw from one stream, and
saving it, restoring it and forking it work as they do on a GPU."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import torch

from megatron_plugins.cpu.piece import Piece, replace
from torch_plugins.config import ConfigError


class _Generators:
    """``torch.cuda.default_generators`` of one device, whatever index asks."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _rng() -> None:
    generator = torch.default_generator

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        if state.numel() != generator.get_state().numel():
            raise ConfigError(
                "the checkpoint holds the random state of a GPU, which a CPU cannot continue; "
                "load it with --no-load-rng"
            )
        generator.set_state(state)

    def set_state_all(states: list[torch.Tensor]) -> None:
        set_state(states[0])

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    answers: dict[str, Any] = {
        "get_rng_state": lambda device=None: generator.get_state(),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state": set_state,
        "set_rng_state_all": set_state_all,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "initial_seed": lambda: generator.initial_seed(),
    }
    for name, answer in answers.items():
        replace(torch.cuda, name, answer)
        replace(torch.cuda.random, name, answer)
    replace(torch.cuda, "default_generators", _Generators())


def _tracker(module: ModuleType) -> None:
    logging.getLogger(module.__name__).addFilter(_not_the_one_generator)


def _not_the_one_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


PIECES = (
    Piece(
        "rng",
        "the tensor-parallel RNG tracker saves, forks and restores the CUDA generator; its warning "
        "that the CPU generator moved is dropped, as the two are one",
        "everything",
        _rng,
        {"megatron.core.tensor_parallel.random": _tracker},
    ),
)
