"""Process groups run on gloo, and what gloo lacks is made of what it has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megatron_plugins.cpu.piece import Piece, replace
from torch_plugins.config import ConfigError


def redirect_group(function: Callable[..., Any], default: str | None = None) -> Callable[..., Any]:
    """Wrap a maker of process groups: ``nccl``, alone or in a list such as ``cpu:gloo,cuda:nccl``,
    becomes ``gloo``; ``device_id`` and ``pg_options`` are dropped."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        backend = bound.arguments.pop("backend", None) or default
        if backend is not None:
            bound.arguments["backend"] = "gloo" if "nccl" in backend else backend
        for name in ("device_id", "pg_options"):
            bound.arguments.pop(name, None)
        return function(*bound.args, **bound.kwargs)

    return call


def _groups() -> None:
    original_barrier = dist.barrier

    @functools.wraps(original_barrier)
    def barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return original_barrier(*args, **kwargs)

    replace(dist, "init_process_group", redirect_group(dist.init_process_group, default="gloo"))
    for name in ("new_group", "new_subgroups_by_enumeration"):
        replace(dist, name, redirect_group(getattr(dist, name)))
    replace(dist, "barrier", barrier)


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


def _all_to_all() -> None:
    all_to_all_single = dist.all_to_all_single

    def sizes(splits: Any) -> Any:
        return None if splits is None else [int(size) for size in splits]

    @functools.wraps(all_to_all_single)
    def with_int_splits(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return all_to_all_single(
            output, input, sizes(output_split_sizes), sizes(input_split_sizes), *args, **kwargs
        )

    replace(dist, "all_to_all_single", with_int_splits)


def _sends() -> None:
    isend = dist.isend

    @functools.wraps(isend)
    def isend_kept(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # A view of its own: its storage lives until the send is done, whatever becomes of tensor.
        return isend(tensor.detach(), *args, **kwargs)

    replace(dist, "isend", isend_kept)
    replace(dist.distributed_c10d, "isend", isend_kept)


def _batched_p2p(module: ModuleType) -> None:
    batched = module._batched_p2p_ops

    @functools.wraps(batched)
    def unambiguous(**kwargs: Any) -> Any:
        both = (
            (kwargs["tensor_send_prev"] is not None and kwargs["tensor_send_next"] is not None)
            or (kwargs["tensor_recv_prev"] is not None and kwargs["tensor_recv_next"] is not None)
        )  # fmt: skip
        if both and kwargs["prev_pipeline_rank"] == kwargs["next_pipeline_rank"]:
            raise ConfigError(
                "batch_p2p_comm=True with virtual pipeline stages on 2 pipeline ranks: activations "
                "and gradients would be mistaken for each other; use overlap_p2p_comm=True and "
                "batch_p2p_comm=False (no --no-overlap-p2p-communication)"
            )
        return batched(**kwargs)

    replace(module, "_batched_p2p_ops", unambiguous)


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
    Piece(
        "all-to-all",
        "upstream turns its split sizes into lists only when they come from a CUDA tensor",
        "MoE with expert parallelism",
        _all_to_all,
    ),
    Piece(
        "sends",
        "the pipeline schedules of 0.17 empty a tensor while gloo still sends it, which a CUDA "
        "stream would put in order; the next stage gets garbage",
        "virtual pipeline stages",
        _sends,
    ),
    Piece(
        "batched-p2p",
        "gloo matches messages by order: two exchanges between the same two ranks in one batch are "
        "swapped, and the model trains wrong in silence; this raises instead",
        "virtual pipeline stages",
        modules={"megatron.core.pipeline_parallel.p2p_communication": _batched_p2p},
    ),
)
