"""Seconds of a forward pass from those of its modules and all-reduces."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def standard(compute: Sequence[float], reduce: Sequence[float]) -> float:
    """``sum(a_i + c_i)``: nothing overlaps."""
    return sum(compute) + sum(reduce)


def ladder(
    compute: Sequence[float],
    reduce: Sequence[float],
    contention: float = 0.0,
    layers: Collection[int] | None = None,
) -> float:
    """A ladder in the given ``layers`` (None: all), modules being attention and MLP in turn.

    Module ``i + 1`` of a ladder layer reads the stream one module early: it and the all-reduce of
    module ``i`` start together, once module ``i`` is computed and all-reduce ``i - 1`` is done. So
    the pair takes ``max(a, c) + ov min(a, c)``; a module of a standard layer takes ``a + c``.
    """
    total = compute[0] if compute else 0.0
    for index in range(1, len(compute)):
        module, wait = compute[index], reduce[index - 1]
        hidden = layers is None or index // 2 in layers
        total += overlapped(module, wait, contention) if hidden else module + wait
    return total + (reduce[-1] if compute else 0.0)


def overlapped(module: float, reduce: float, contention: float) -> float:
    """``max(a, c) + ov min(a, c)``."""
    return max(module, reduce) + contention * min(module, reduce)


def parallel(compute: Sequence[float], reduce: Sequence[float]) -> float:
    """Attention and MLP side by side: one all-reduce a layer, of the sum of both."""
    return sum(compute) + sum(reduce[1::2])


def desync(compute: Sequence[float], reduce: Sequence[float], every: int) -> float:
    """Only one in ``every`` all-reduces is left, the last one of the model among them."""
    return sum(compute) + sum(reduce[::-1][::every])


def from_measured(
    standard: float,
    no_communication: float,
    contention: float,
    modules: int | None = None,
    layers: Collection[int] | None = None,
) -> float:
    """A ladder's time from two that were measured, in any unit.

    ``modules`` equal ones: ``a = no_communication / n``, ``c = (standard - no_communication) / n``.
    None leaves out that the first module and the last all-reduce overlap nothing.
    """
    if modules is None:
        return overlapped(no_communication, standard - no_communication, contention)
    compute = [no_communication / modules] * modules
    reduce = [(standard - no_communication) / modules] * modules
    return ladder(compute, reduce, contention, layers)
