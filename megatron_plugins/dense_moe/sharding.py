"""Checkpoint keys of the experts: those of Megatron's own MoE layers.

A stock ``MoELayer`` stores expert matrices under ``experts.experts.``, stacked along an axis of
experts: ``linear_fc1.weight [N, F, D]``, with gates ``[N, 2 F, D]``, gates first within an expert,
and ``linear_fc2.weight [N, D, F]``; its router under ``router.weight [N, D]``. So are the blocks of
the wide MLP, and a stock layer loads them under any expert-parallel size.

Shapes: N experts of this process, F width of one, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import mapping
from megatron.core.transformer import utils
from torch import Tensor


def with_expert_keys(mlp: Any, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
    """Sharded state of an ``ExpertsMLP``."""
    metadata = utils.ensure_metadata_has_dp_cp_group(metadata)
    state: dict[str, Any] = {}
    for name, module in mlp.named_children():
        state |= utils.sharded_state_dict_default(
            module, f"{prefix}{name}.", sharded_offsets, metadata
        )
    gated = mlp.config.gated_linear_unit
    for linear, parts in (("linear_fc1", 2 if gated else 1), ("linear_fc2", 1)):
        name, key = f"{prefix}{linear}.", f"{prefix}experts.experts.{linear}."
        offsets, count = tuple(sharded_offsets), mlp.own.stop - mlp.own.start
        state[f"{name}weight"] = _factory(
            state[f"{name}weight"], f"{key}weight", offsets, mlp.tp_group, count, parts
        )
        extra = state.pop(f"{name}_extra_state", None)
        for expert in range(mlp.own.start, mlp.own.stop) if extra else ():
            state[_of_expert(prefix, linear, expert)] = utils.make_sharded_object_for_checkpoint(
                extra.data,
                f"{key}_extra_state",
                (*offsets, (len(offsets), expert, mlp.router.experts)),
                replica_id=(0, 0, extra.replica_id[-1]),
            )
    return state


def _of_expert(prefix: str, linear: str, expert: int) -> str:
    return f"{prefix}experts.{expert}.{linear}._extra_state"


def take_one_extra_state(mlp: Any, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Before ``load_state_dict``: what was stored for each expert is the linear's own."""
    for linear in ("linear_fc1", "linear_fc2"):
        for expert in range(mlp.own.start, mlp.own.stop):
            name = _of_expert(prefix, linear, expert)
            if name in state:
                state[f"{prefix}{linear}._extra_state"] = state.pop(name)


def _factory(
    stock: Any, key: str, offsets: tuple[Any, ...], group: Any, experts: int, parts: int
) -> Any:
    """A matrix that is stored expert by expert, its ``parts`` (gate and value) one after another.

    ``linear_fc2`` is told by its shape: experts lie along its columns.
    """
    rows = "linear_fc1" in key
    shape = stock.data.shape
    lead = len(offsets)

    def split(matrix: Tensor) -> list[Tensor]:
        """Into ``parts`` tensors ``[N, F, D]``, or one ``[N, D, F]``."""
        if rows:
            return list(matrix.unflatten(0, (parts, experts, -1)).unbind(0))
        return [matrix.unflatten(1, (experts, -1)).transpose(0, 1).contiguous()]

    @torch.no_grad()
    def build(key: str, matrix: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
        along = (lead, group.rank(), group.size())
        return [
            mapping.ShardedTensor.from_rank_offsets(
                key,
                part,
                *offsets,
                along,
                *([(lead + 1, number, parts)] if parts > 1 else []),
                replica_id=replica_id,
                prepend_axis_num=lead,
            )
            for number, part in enumerate(split(matrix))
        ]

    @torch.no_grad()
    def merge(parts_of: list[Tensor]) -> Tensor:
        if rows:
            return torch.stack(parts_of).reshape(shape)
        return parts_of[0].transpose(0, 1).reshape(shape)

    return mapping.ShardedTensorFactory(key, stock.data, build, merge, stock.replica_id)
