"""What is timed: an arm, ours or a peer's, and a row, the arms that compute the same thing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from timing import Call, Effort, take_turns


class Unavailable(Exception):
    """A peer, or an operator of ours, that is not here; says why."""


def native(*names: str) -> list[Callable[..., Any]]:
    """Functions of ``torch_plugins.ops``, each as ``module.function``; the last is an operator.

    Raises:
        Unavailable: the native library was not built or is off, or has no such operator.
    """
    import torch

    from torch_plugins import native as library

    if not library.active():
        raise Unavailable(library.load()["cpu"])
    found = []
    for name in names:
        module, _, function = name.partition(".")
        try:
            found.append(getattr(importlib.import_module(f"torch_plugins.ops.{module}"), function))
        except (ImportError, AttributeError):
            raise Unavailable(f"torch_plugins.ops has no {name}") from None
    operator = names[-1].rpartition(".")[2]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_plugins::{operator}", "CPU"):
        raise Unavailable(f"{operator} has no native kernel: it would run in Python")
    return found


class Wrong(Exception):
    """An operator of ours that does not compute what its reference does."""


Tell = Callable[[str], None]
"""What the run does now; with LEFT_OUT or WRONG before it, what is to be remembered."""
LEFT_OUT, WRONG = "- ", "! "


@contextmanager
def may_fail(name: str, tell: Tell, ours: bool = False) -> Iterator[None]:
    """An arm that is not here, or fails, is told of, and the run goes on without it."""
    try:
        yield
    except Unavailable as why:
        tell(f"{LEFT_OUT}{name}: {why}")
    except Exception as why:
        words = f"{name}: {type(why).__name__}: {(str(why).splitlines() or [''])[0][:200]}"
        tell((WRONG if ours else LEFT_OUT) + words)


@dataclass(frozen=True)
class Arm:
    call: Call
    scheme: str = ""
    """Bits of weights and activations, and groups."""
    floor: float | None = None
    """Seconds at the machine's limit, see ``limits.py``."""
    error: float | None = None
    """Of its output, relative to the fp32 result."""


Row = dict[str, Any]
"""One line of the JSON file, as :func:`measure` makes it."""


def measure(arms: Mapping[str, Arm], effort: Effort, threads: int, **what: Any) -> Row:
    """Time the arms of one row.

    Args:
        what: says what is computed: operator, shape, tokens, state.

    Returns:
        That, ``threads``, the ``clock`` that counts (``cpu`` or ``wall``), and the arms, each with
        its seconds in every round by both clocks, and their median by the one that counts.
    """
    times = take_turns({name: arm.call for name, arm in arms.items()}, effort, threads)
    clock = "cpu" if threads == 1 else "wall"
    return {
        **what,
        "threads": threads,
        "clock": clock,
        "arms": {
            name: {
                "scheme": arm.scheme,
                "floor": arm.floor,
                "error": arm.error,
                "median": median(times[name][clock]),
                **times[name],
            }
            for name, arm in arms.items()
        },
    }


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over that of what is expected (tensors)."""
    difference = found.float() - expected.float()
    return float(difference.norm() / expected.float().norm())
