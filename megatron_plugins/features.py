"""Where a feature's Megatron adapter lies: the module named like its key."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def adapter(key: str) -> ModuleType:
    """``ladder_residual -> megatron_plugins.ladder_residual``, imported on first use."""
    return import_module(f"megatron_plugins.{key}")
