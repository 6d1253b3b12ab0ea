"""Tensor-parallel reductions that overlap other compute, forward and backward.

A row-parallel linear ends with a collective: an all-reduce of its partial sums, or under sequence
parallelism a reduce-scatter along the sequence. :func:`keep_partial_sums` takes that collective out
of the linear, :func:`reduce_async` launches it later without waiting, and :meth:`InFlight.wait`
must run before the result is read: until then the buffer holds unspecified values.

The backward of a column-parallel linear ends with a collective too, of its input's gradient.
:class:`Launches` lets Megatron's linear launch it, and :func:`wait_for_gradient` is the place in
autograd's graph that waits for it.

Shapes: S sequence, B batch, H hidden, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed both and warns at the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class InFlight:
    """One collective, from its launch to its end.

    Args:
        what: whose it is, for the error when it fails.
    """

    __slots__ = ("what", "work")

    def __init__(self, what: str = "the ladder") -> None:
        self.what = what
        self.work: Any = None

    def launch(self, collective: Callable[..., Any], *tensors: Tensor, group: Any) -> None:
        """``collective(*tensors, group=group)``, which goes on by itself.

        Raises:
            RuntimeError: another process is gone.
        """
        with self._named():
            self.work = collective(*tensors, group=group, async_op=True)

    def wait(self) -> None:
        """Until it has ended; any number of times.

        Raises:
            RuntimeError: another process is gone, or the collective timed out.
        """
        work, self.work = self.work, None
        if work is not None:
            with self._named():
                work.wait()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.what}: tensor-parallel communication failed; if another rank ended before "
                f"this one, its log has the cause: {error}"
            ) from error


class _ReduceAsync(torch.autograd.Function):
    """Forward: launch the collective. Backward: its adjoint, the identity or an all-gather, which
    is launched too."""

    @staticmethod
    def forward(
        ctx: Any,
        partial_sums: Tensor,
        in_flight: InFlight,
        gathered: InFlight,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.in_flight, ctx.gathered = in_flight, gathered
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        if not sequence_parallel:
            buffer = partial_sums.contiguous()
            in_flight.launch(dist.all_reduce, buffer.detach(), group=group)
            return buffer
        size = dist.get_world_size(group)
        reduced = partial_sums.new_empty(partial_sums.shape[0] // size, *partial_sums.shape[1:])
        # Detached: gloo copies into its output in a thread of its own, where autograd records.
        source = partial_sums.detach().contiguous()
        in_flight.launch(_reduce_scatter, reduced.detach(), source, group=group)
        return reduced

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        # A recomputed module launches a reduction whose sum nobody reads: it ends here at last.
        ctx.in_flight.wait()
        if not ctx.sequence_parallel:
            return grad, None, None, None, None
        size = dist.get_world_size(ctx.group)
        gathered = grad.new_empty(grad.shape[0] * size, *grad.shape[1:])
        ctx.gathered.launch(_all_gather, gathered, grad.contiguous(), group=ctx.group)
        return gathered, None, None, None, None


def reduce_async(
    partial_sums: Tensor, group: dist.ProcessGroup, sequence_parallel: bool, what: str
) -> tuple[Tensor, InFlight]:
    """Launch the reduction of a row-parallel module's partial sums over ``group``.

    Args:
        partial_sums: [S, B, H], this rank's addend. It is reduced in place unless
            ``sequence_parallel``; nothing else may read it any more.
        group: tensor-parallel group of size T.
        sequence_parallel: reduce-scatter along S instead of all-reduce.
        what: the module, for the error when the collective fails.

    Returns:
        The reduced tensor, [S, B, H] or [S/T, B, H], and the collective to wait for before
        reading it.
    """
    in_flight, gathered = InFlight(what), InFlight(f"{what}, backward")
    if sequence_parallel:
        partial_sums = wait_for_gradient(partial_sums, gathered)
    reduced = _ReduceAsync.apply(partial_sums, in_flight, gathered, group, sequence_parallel)
    return reduced, in_flight


def gather_async(part: Tensor, whole: Tensor, group: dist.ProcessGroup, what: str) -> InFlight:
    """Launch the all-gather of ``part`` [S/T, B, H] into ``whole`` [S, B, H]; no gradient."""
    in_flight = InFlight(what)
    in_flight.launch(_all_gather, whole, part.detach().contiguous(), group=group)
    return in_flight


def launches_in_backward(reduced: Tensor) -> bool:
    """Whether a tensor is what :func:`reduce_async` returned, with its node in the graph."""
    return reduced.grad_fn is not None and reduced.grad_fn.name() == "_ReduceAsyncBackward"


class _WaitForGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, in_flight: InFlight) -> Tensor:
        ctx.in_flight = in_flight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.in_flight.wait()
        return grad, None


def wait_for_gradient(x: Tensor, in_flight: InFlight, number: int | None = None) -> Tensor:
    """``x``, whose gradient a collective is still writing when it gets here in the backward.

    One operation alone may read the result: gradients that several send are added, and so read.

    Args:
        number: autograd's sequence number for the wait. Of the operations that could run, the
            backward runs the one with the highest number: a lower number than that of compute which
            does not need this gradient has that compute run first. Default: its own, the order of
            the forward.
    """
    waited = _WaitForGradient.apply(x, in_flight)
    if number is not None:
        renumber(waited, number)
    return waited


def renumber(x: Tensor, number: int) -> None:
    """Give the operation that made ``x`` another place in the order of the backward.

    As Megatron's shared experts do: torch has no public name for it.
    """
    node: Any = x.grad_fn
    if node is not None:
        node._set_sequence_nr(number)


class _Launched:
    """What a linear may wait for at once: nothing."""

    def wait(self, *_: Any) -> bool:
        return True


@dataclass
class _Failed:
    """A collective that could not be launched; the error is due where it is waited for."""

    error: RuntimeError

    def wait(self) -> None:
        raise self.error


_ProcessGroup: Any = dist.ProcessGroup


class Launches(_ProcessGroup):
    """Tensor-parallel group for one call of a column-parallel linear, Megatron's or
    TransformerEngine's.

    In place of the group, it has the linear's own code leave its collectives in flight: dgrad,
    launch, wgrad, and no wait. Any other collective than the linear's is an error. No method raises
    what a collective does: torch would look up this group to describe it.

    Args:
        group: of the linear.
        reduced: takes the reduction of the input's gradient, for :func:`wait_for_gradient`; None:
            the linear waits for it.
        gathered: sequence parallel: the whole input of the forward.
        what: whose collectives they are.
        owned: ``gathered`` has no other reader, so that the linear may have it without a copy.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        reduced: InFlight | None,
        gathered: Tensor | None,
        what: str,
        owned: bool = False,
    ) -> None:
        super().__init__(group.rank(), group.size())
        self.group, self.reduced, self.gathered, self.what = group, reduced, gathered, what
        self.owned = owned

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return self._leave(dist.all_reduce, tensor)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, options: Any = None) -> Any:
        return self._leave(_reduce_scatter, output, source)

    def all_gather_single(self, output: Tensor, source: Tensor, options: Any = None) -> Any:
        """In the forward the input, which is there; in the backward again, for the weight."""
        gathered, self.gathered = self.gathered, None
        if gathered is None:
            return self._begin(InFlight(self.what), _all_gather, output, source)
        if self.owned:
            output.set_(gathered.view(output.shape))  # type: ignore[call-overload]
        elif output.data_ptr() != gathered.data_ptr():
            output.copy_(gathered)
        return _Launched()

    _reduce_scatter_base, _allgather_base = reduce_scatter_single, all_gather_single

    def _leave(self, collective: Callable[..., Any], *tensors: Tensor) -> Any:
        if self.reduced is None:
            return self._begin(InFlight(self.what), collective, *tensors)
        self._begin(self.reduced, collective, *tensors)
        return _Launched()

    def _begin(
        self, in_flight: InFlight, collective: Callable[..., Any], *tensors: Tensor
    ) -> InFlight:
        try:
            in_flight.work = collective(*tensors, group=self.group, async_op=True)
        except RuntimeError as error:
            in_flight.work = _Failed(error)
        return in_flight


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
