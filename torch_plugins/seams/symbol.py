"""One upstream symbol that a host's plugins touch: a row of that host's ledger."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """One row. ``targets`` are ``module:attribute``: the places where the versions of the window
    keep the symbol; one of them is enough."""

    id: str
    targets: tuple[str, ...]
    feature: str
    """Key of the feature that needs it; ``any``: all of them; ``export``: the exporter's check."""
    why: str
    remove_when: str
    versions: str = "0.17-0.20"
    handler: str | None = None
    """``module:function`` of ours that wraps it, called as ``function(original, *args, **kwargs)``;
    None: only called, read or subclassed."""
    relies_on: tuple[str, ...] = ()
    """Attributes of its instances or names in its body that we read or set."""
