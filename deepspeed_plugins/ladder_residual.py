"""Ladder Residual from DeepSpeed's JSON (arXiv 2501.06589)::

    "deepspeed_plugins": {"ladder_residual": {"layers": "all"}}

Under ZeRO alone it changes the function of the model, and not its speed: what a ladder overlaps are
reductions of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed_plugins import conversion
from torch_plugins.config import ConfigError, LadderResidual


def validate(settings: LadderResidual, engine_arguments: Mapping[str, Any]) -> None:
    """Refuse a ladder without layers.

    Raises:
        ConfigError: no layer of the model is named.
    """
    layers = conversion.layers_of(engine_arguments["model"])
    if layers and not settings.resolve(layers):
        raise ConfigError(
            f"{conversion.SECTION}.{settings.key()}.layers {settings.layers!r} has no ladder "
            f"layer: name at least one of 0 to {layers - 1}, or drop {settings.key()}"
        )


def describe(settings: LadderResidual, engine: Any) -> str:
    """``"4 of 4 layers"``.

    Raises:
        ConfigError: the engine's model has other ladder layers.
    """
    return conversion.describe(
        settings, engine, lambda layers: f"{len(settings.resolve(layers))} of {layers} layers"
    )
