"""Process groups run on gloo, and what gloo lacks is made of what it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_plugins.cpu.piece import Piece, replace


def on_gloo(backend: Any) -> Any:
    """``nccl``, alone or in a list such as ``cpu:gloo,cuda:nccl``, becomes ``gloo``."""
    return "gloo" if isinstance(backend, str) and "nccl" in backend else backend


def _groups() -> None:
    def redirect(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "backend" in kwargs:
                kwargs["backend"] = on_gloo(kwargs["backend"])
            for name in ("device_id", "pg_options"):
                kwargs.pop(name, None)
            return function(*args, **kwargs)

        return call

    def barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return original_barrier(*args, **kwargs)

    original_barrier = dist.barrier
    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration"):
        replace(dist, name, redirect(getattr(dist, name)))
    replace(dist, "barrier", functools.wraps(original_barrier)(barrier))


def _average() -> None:
    all_reduce = dist.all_reduce

    @functools.wraps(all_reduce)
    def average(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != dist.ReduceOp.AVG:
            return all_reduce(tensor, op, group, async_op)
        if async_op:
            raise NotImplementedError("gloo cannot average asynchronously; reduce with SUM")
        all_reduce(tensor, dist.ReduceOp.SUM, group)
        tensor.div_(dist.get_world_size(group))
        return None

    replace(dist, "all_reduce", average)


PIECES = (
    Piece(
        "process-groups",
        "nccl means gloo, which knows neither device_id nor NCCL options",
        "every process group",
        _groups,
    ),
    Piece(
        "average",
        "gloo has no ReduceOp.AVG: the sum is divided by the group's size",
        "logging of MoE losses",
        _average,
    ),
)
