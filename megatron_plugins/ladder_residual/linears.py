"""Column-parallel linears whose collectives the ladder hides: Megatron's own.

A call gets another group than its own, :class:`~megatron_plugins.reduction.Launches`, which leaves
the reduction of the input's gradient in flight, and under sequence parallelism has the whole input.
``overlap.py`` sets the attributes of a linear: ``ladder_what``, whose it is; ``ladder_module``, the
number of its module; ``ladder_places``; ``ladder_gathering``, what the module before began; and
``ladder_then``, what follows its forward.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_plugins import reduction
from megatron_plugins.reduction import Launches, wait_for_gradient

Places = dict[int, int]
"""By module of the model: autograd's number for what waits there."""


def is_local(linear: Any) -> bool:
    """Whether a module is Megatron's ``ColumnParallelLinear``, and not an expert's."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    return isinstance(linear, ColumnParallelLinear) and not linear.is_expert


def local_class(linear: Any) -> type:
    """The class that overlaps, for Megatron's linear."""
    own: Any = type(linear)
    return _overlapping_class(own)


@cache
def _overlapping_class(base: Any) -> type:
    """A subclass of Megatron's ``ColumnParallelLinear`` that overlaps."""

    class Overlapping(base):
        def _forward_impl(
            self, input: Tensor, weight: Tensor, *args: Any, tp_group: Any, **kwargs: Any
        ) -> Any:
            input, tp_group = enter(self, input, tp_group, kwargs["sequence_parallel"])
            output = super()._forward_impl(input, weight, *args, tp_group=tp_group, **kwargs)
            leave(self)
            return output

        ladder_owns_buffer = False

        def ladder_buffer(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
            """That which the linear's own code gathers into."""
            from megatron.core.parallel_state import get_global_memory_buffer

            buffer: Tensor = get_global_memory_buffer().get_tensor(shape, part.dtype, "mpu")
            return buffer

    Overlapping.__name__ = Overlapping.__qualname__ = f"Overlapping{base.__name__}"
    return Overlapping


def enter(linear: Any, x: Tensor, group: Any, sequence_parallel: bool) -> tuple[Tensor, Any]:
    """The input and the group with which a linear is to be called.

    Args:
        x: [S, B, H], or [S/T, B, H] under sequence parallelism.
    """
    if torch.is_anomaly_enabled():  # it reads every gradient at once
        return x, group
    whole = gathered(linear, x) if sequence_parallel else None
    reduced = None
    if torch.is_grad_enabled() and x.requires_grad:
        reduced = reduction.InFlight(f"{linear.ladder_what}, gradient of its input")
        number = linear.ladder_places.get(linear.ladder_module - 1)
        x = wait_for_gradient(x, reduced, number)
    if reduced is not None or whole is not None:
        what = f"{linear.ladder_what}, backward"
        group = Launches(group, reduced, whole, what, linear.ladder_owns_buffer)
    return x, group


def leave(linear: Any) -> None:
    """After a linear's forward."""
    if linear.ladder_then is not None and not torch.is_anomaly_enabled():
        linear.ladder_then()


def gather(linear: Any, part: Tensor) -> tuple[Tensor, Tensor, reduction.InFlight]:
    """Begin the all-gather of a linear's input [S/T, B, H]."""
    whole = linear.ladder_buffer(part, (part.shape[0] * linear.tp_group.size(), *part.shape[1:]))
    what = f"{linear.ladder_what}, its input"
    return part, whole, reduction.gather_async(part, whole, linear.tp_group, what)


def gathered(linear: Any, part: Tensor) -> Tensor:
    """The whole input, for which the module before may have begun the all-gather."""
    begun, linear.ladder_gathering = linear.ladder_gathering, None
    if begun is not None and begun[0].data_ptr() != part.data_ptr():
        begun[2].wait()
        begun = None
    _, whole, in_flight = begun or gather(linear, part)
    in_flight.wait()
    return whole
