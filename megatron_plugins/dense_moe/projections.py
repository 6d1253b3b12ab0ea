"""Query and output projections of the attention experts that inference keeps.

Only Megatron's own linears are left out of, expert by expert; TransformerEngine's compute all
heads.

Shapes: S sequence, B batch, D hidden size, J key-value heads of this process, A experts of each, P
head dimension.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor
from torch.nn import functional as F

from megatron_plugins.reduction import keeps_partial_sums


def can_leave_out(linear: Any) -> bool:
    """Whether a linear computes nothing but ``weight x + bias`` and its collectives."""
    return type(linear) in (layers.ColumnParallelLinear, layers.RowParallelLinear)


def queries(linear: Any, x: Tensor, kept: Tensor, groups: int, size: int) -> Tensor:
    """What ``linear_qkv`` gives, ``[S, B, J (A + 2) P]``, with zeros for queries that are left out.

    Args:
        linear: its rows are, of each key-value head, A query heads, and key and value unless these
            are another layer's.
        x: ``[S, B, D]``, under sequence parallelism this process's part of S.
        kept: ``[S, B, A]``.
        groups, size: J and P.
    """
    if linear.sequence_parallel:
        x = mappings.gather_from_sequence_parallel_region(x, group=linear.tp_group)
    experts = kept.shape[-1]
    weight = linear.weight.unflatten(0, (groups, -1, size))
    bias = None if linear.bias is None else linear.bias.unflatten(0, (groups, -1, size))
    out = x.new_zeros(*kept.shape[:2], *weight.shape[:3])

    def project(rows: Tensor, heads: Any) -> Tensor:
        own = None if bias is None else bias[:, heads].flatten()
        whole = weight[:, heads]
        return F.linear(rows, whole.flatten(0, -2), own).unflatten(-1, whole.shape[:-1])

    if weight.shape[1] > experts:
        out[..., experts:, :] = project(x, slice(experts, None))
    for expert in range(experts):
        tokens = kept[..., expert]
        out[..., expert, :][tokens] = project(x[tokens], expert)
    return out.flatten(2)


def output(linear: Any, heads: Tensor, kept: Tensor, groups: int, size: int) -> Tensor:
    """What ``linear_proj`` gives for ``heads`` ``[S, B, J A P]``, those left out being zeros."""
    experts = kept.shape[-1]
    weight = linear.weight.unflatten(1, (groups, experts, size))
    heads = heads.unflatten(2, (groups, experts, size))
    out = heads.new_zeros(*kept.shape[:2], weight.shape[0])
    for expert in range(experts):
        tokens = kept[..., expert]
        own = heads[..., expert, :][tokens].flatten(1)
        out[tokens] += F.linear(own, weight[:, :, expert].flatten(1))
    return combine(linear, out)


def combine(linear: Any, partial_sums: Tensor) -> Tensor:
    """The sum over tensor-parallel processes, as a row-parallel linear would give it."""
    group = linear.tp_group
    if group.size() == 1 or keeps_partial_sums(linear):
        return partial_sums
    if linear.config.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(partial_sums, group=group)
    return mappings.reduce_from_tensor_model_parallel_region(partial_sums, group=group)
