"""Wrappers that stay cheap until a plugin is on: the rest of the package is imported only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def block_submodules(
    original: Callable[..., Any], config: Any, spec: Any, *args: Any, **kwargs: Any
) -> Any:
    """Submodules of a TransformerBlock, its layer specs rewritten when ``config`` has plugins."""
    if not getattr(config, "megatron_plugins", None):
        return original(config, spec, *args, **kwargs)
    from megatron_plugins import layers

    return layers.block_submodules(original, config, spec, *args, **kwargs)
