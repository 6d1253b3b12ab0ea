"""Ladder Residual from DeepSpeed's JSON (arXiv 2501.06589)::

    "deepspeed_plugins": {"ladder_residual": {"layers": "all"}}

Under ZeRO alone it changes the function of the model, and not its speed: what a ladder overlaps are
reductions of tensor parallelism.
"""

from __future__ import annotations

from typing import Any

from deepspeed_plugins import conversion
from torch_plugins.config import LadderResidual


def describe(settings: LadderResidual, engine: Any) -> str:
    """``"4 of 4 layers"``.

    Raises:
        ConfigError: the engine's model has other ladder layers.
    """
    return conversion.describe(
        settings, engine, lambda layers: f"{len(settings.resolve(layers))} of {layers} layers"
    )
