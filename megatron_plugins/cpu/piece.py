"""What a redirection is, and how it is put in place and taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Piece:
    """One named redirection of the CPU backend."""

    name: str
    reason: str
    """What breaks without it."""
    needed_by: str
    apply: Callable[[], None] | None = None
    """Redirects torch itself; called once, when the backend is installed."""
    modules: Mapping[str, Callable[[ModuleType], None]] = field(default_factory=dict)
    """Upstream module -> function that redirects it, called each time that module was executed."""


_MISSING = object()
_replaced: dict[tuple[int, str], tuple[Any, str, Any, Any]] = {}


def replace(owner: Any, name: str, value: Any) -> None:
    """Set ``owner.name = value``, remembering what was there. A second call with the first one's
    value still in place does nothing, so pieces may be applied again after a module reload.
    """
    key = (id(owner), name)
    current = vars(owner).get(name, _MISSING)
    if key in _replaced and current is _replaced[key][3]:
        return
    _replaced[key] = (owner, name, current, value)
    setattr(owner, name, value)


def restore() -> None:
    """Undo every :func:`replace`."""
    for owner, name, original, value in reversed(_replaced.values()):
        if vars(owner).get(name) is not value:
            continue
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    _replaced.clear()
