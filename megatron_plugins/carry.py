"""What one layer hands to the next beside the residual stream.

Megatron threads one value, ``context``, from layer to layer, and leaves it alone in a decoder. The
features share it: each keeps its tensors there under names of its own. Full activation
recomputation takes and returns tensors only, so :func:`through_checkpoint` spells a carry out at
the borders of a recomputed chunk: its tensors go in and come out like the hidden states.

The stack of a hybrid model drops ``context`` behind every layer, and while it recomputes all of
them, behind layers of other kinds. Its layers that share a :class:`Channel` find it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Carry:
    """Tensors by name; never empty."""

    tensors: dict[str, Tensor]
    channel: Channel | None = None
    """Of the stack whose layers hand it on."""


@dataclass(eq=False)
class Channel:
    """The carry behind the last layer of a stack that knows of it."""

    first: int
    """The first layer that takes part."""
    carry: Carry | None = None


@dataclass
class Chunk:
    """A recomputed chunk of such layers while it runs: the same, within it."""

    carry: Carry | None = None


RUNNING: ContextVar[Chunk | None] = ContextVar("the recomputed chunk that runs", default=None)


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
    given: Carry | None = args[place] if from_end else None
    names_in = tuple(given.tensors) if given else ()
    channel = given.channel if given else None
    names_out: tuple[str, ...] = ()

    def spelled_out(*values: Any) -> Any:
        nonlocal names_out, channel
        carry = None
        if names_in:
            values, tensors = values[: -len(names_in)], values[-len(names_in) :]
            at, carry = len(values) - from_end, _named(names_in, tensors, channel)
            values = (*values[:at], carry, *values[at + 1 :])
        chunk = Chunk(carry if channel else None)
        outer = RUNNING.set(chunk)
        try:
            result = function(*values)
        finally:
            RUNNING.reset(outer)
        if not isinstance(result, tuple):
            return result
        carry = result[-1] if isinstance(result[-1], Carry) else chunk.carry
        if carry is None:
            return result
        names_out, channel = tuple(carry.tensors), carry.channel
        return (*result[:-1], *carry.tensors.values())

    if names_in:
        args = (*args[:place], None, *args[place + 1 :], *args[place].tensors.values())
    result = original(spelled_out, *args, **kwargs)
    carry = None
    if names_out:
        carry = _named(names_out, result[-len(names_out) :], channel)
        result = (*result[: -len(names_out)], carry)
    if channel is not None:
        channel.carry = carry
    return result


def _named(names: Sequence[str], tensors: Sequence[Tensor], channel: Channel | None) -> Carry:
    return Carry(dict(zip(names, tensors, strict=True)), channel)
