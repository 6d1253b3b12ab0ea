"""What one layer hands to the next beside the residual stream.

Megatron threads one value, ``context``, from layer to layer, and leaves it alone in a decoder. The
features share it: each keeps its tensors there under names of its own. Full activation
recomputation takes and returns tensors only, so :func:`through_checkpoint` spells a carry out at
the borders of a recomputed chunk: its tensors go in and come out like the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Carry:
    """Tensors by name; never empty."""

    tensors: dict[str, Tensor]


def get(context: Carry | None, name: str) -> Tensor | None:
    return None if context is None else context.tensors.get(name)


def put(context: Carry | None, tensors: Mapping[str, Tensor | None]) -> Carry | None:
    """``context`` with these tensors; None takes one out."""
    before = {} if context is None else context.tensors
    kept = {name: tensor for name, tensor in {**before, **tensors}.items() if tensor is not None}
    return Carry(kept) if kept else None


def through_checkpoint(
    original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Wrap of ``checkpoint(function, ..., *args)``: a carry among ``args``, and one at the end of
    what ``function`` returns, cross it as their tensors."""
    place = next((i for i, value in enumerate(args) if isinstance(value, Carry)), len(args))
    from_end = len(args) - place  # the checkpoint keeps its own leading arguments to itself
    names_in = tuple(args[place].tensors) if from_end else ()
    names_out: tuple[str, ...] = ()

    def spelled_out(*values: Any) -> Any:
        nonlocal names_out
        if names_in:
            values, tensors = values[: -len(names_in)], values[-len(names_in) :]
            at = len(values) - from_end
            values = (*values[:at], _named(names_in, tensors), *values[at + 1 :])
        result = function(*values)
        if not (isinstance(result, tuple) and isinstance(result[-1], Carry)):
            return result
        names_out = tuple(result[-1].tensors)
        return (*result[:-1], *result[-1].tensors.values())

    if names_in:
        args = (*args[:place], None, *args[place + 1 :], *args[place].tensors.values())
    result = original(spelled_out, *args, **kwargs)
    if not names_out:
        return result
    return (*result[: -len(names_out)], _named(names_out, result[-len(names_out) :]))


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> Carry:
    return Carry(dict(zip(names, tensors, strict=True)))
