"""Tensor-parallel reductions that overlap the next module's compute.

A row-parallel linear ends with a collective: an all-reduce of its partial sums, or under sequence
parallelism a reduce-scatter along the sequence. :func:`keep_partial_sums` takes that collective out
of the linear, :func:`reduce_async` launches it later without waiting, and :meth:`InFlight.wait`
must run before the result is read: until then the buffer holds unspecified values.

Shapes: S sequence, B batch, H hidden, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed both and warns at the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class InFlight:
    """The collective of one reduction; :meth:`wait` may be called any number of times."""

    __slots__ = ("work",)

    def __init__(self) -> None:
        self.work: Any = None

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.wait()


class _ReduceAsync(torch.autograd.Function):
    """Forward: launch the collective. Backward: its adjoint, the identity or an all-gather."""

    @staticmethod
    def forward(
        ctx: Any,
        partial_sums: Tensor,
        in_flight: InFlight,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.in_flight, ctx.group, ctx.sequence_parallel = in_flight, group, sequence_parallel
        if not sequence_parallel:
            buffer = partial_sums.contiguous()
            in_flight.work = dist.all_reduce(buffer.detach(), group=group, async_op=True)
            return buffer
        size = dist.get_world_size(group)
        reduced = partial_sums.new_empty(partial_sums.shape[0] // size, *partial_sums.shape[1:])
        # Detached: gloo copies into its output in a thread of its own, where autograd records.
        in_flight.work = _reduce_scatter(
            reduced.detach(), partial_sums.detach().contiguous(), group=group, async_op=True
        )
        return reduced

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # A recomputed module launches a reduction whose sum nobody reads: it ends here at last.
        ctx.in_flight.wait()
        if not ctx.sequence_parallel:
            return grad, None, None, None
        size = dist.get_world_size(ctx.group)
        gathered = grad.new_empty(grad.shape[0] * size, *grad.shape[1:])
        _all_gather(gathered, grad.contiguous(), group=ctx.group)
        return gathered, None, None, None


def reduce_async(
    partial_sums: Tensor, group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[Tensor, InFlight]:
    """Launch the reduction of a row-parallel module's partial sums over ``group``.

    Args:
        partial_sums: [S, B, H], this rank's addend. It is reduced in place unless
            ``sequence_parallel``; nothing else may read it any more.
        group: tensor-parallel group of size T.
        sequence_parallel: reduce-scatter along S instead of all-reduce.

    Returns:
        The reduced tensor, [S, B, H] or [S/T, B, H], and the collective to wait for before
        reading it.
    """
    in_flight = InFlight()
    return _ReduceAsync.apply(partial_sums, in_flight, group, sequence_parallel), in_flight


def keep_partial_sums(linear: Any) -> None:
    """Make a row-parallel linear return its partial sums.

    Megatron's own ``RowParallelLinear`` has the switch ``explicit_expert_comm``, meant for experts
    whose dispatcher reduces. TransformerEngine's linear reduces only in ``parallel_mode="row"``,
    which it reads at each forward; shards and checkpoint layout were fixed when it was built.

    Raises:
        TypeError: the linear has neither switch.
    """
    if hasattr(linear, "explicit_expert_comm"):
        linear.explicit_expert_comm = True
    elif hasattr(linear, "parallel_mode"):
        linear.parallel_mode = None
    else:
        raise TypeError(
            f"{type(linear).__qualname__} has no switch that leaves its output unreduced; "
            "Ladder Residual knows Megatron's RowParallelLinear and TERowParallelLinear"
        )


def keeps_partial_sums(linear: Any) -> bool:
    """Whether :func:`keep_partial_sums` was called on a row-parallel linear."""
    if hasattr(linear, "explicit_expert_comm"):
        return bool(linear.explicit_expert_comm)
    return getattr(linear, "parallel_mode", "row") is None
