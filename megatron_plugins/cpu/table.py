"""Every redirection of the CPU backend, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from megatron_plugins.cpu import datasets, device, distributed, norm, optimizer, rng, streams
from megatron_plugins.cpu.piece import Piece

PIECES: tuple[Piece, ...] = (
    *device.PIECES,
    *rng.PIECES,
    *streams.PIECES,
    *distributed.PIECES,
    *datasets.PIECES,
    *norm.PIECES,
    *optimizer.PIECES,
)

MODULE_PATCHES: dict[str, list[Callable[[ModuleType], None]]] = {}
"""Upstream module -> functions that redirect it right after it was executed."""
for _piece in PIECES:
    for _module, _patch in _piece.modules.items():
        MODULE_PATCHES.setdefault(_module, []).append(_patch)
