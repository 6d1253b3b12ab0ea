"""Ladder Residual from DeepSpeed's JSON (arXiv 2501.06589)::

    "deepspeed_plugins": {"ladder_residual": {"layers": "all"}}

Under ZeRO alone it changes the function of the model, and not its speed: what a ladder overlaps are
reductions of tensor parallelism. With ``"tensor_parallel": {"autotp_size": 2}`` they are AutoTP's;
see :mod:`deepspeed_plugins.tensor_parallel`.
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


def finish(settings: LadderResidual, engine: Any) -> None:
    """Let the ladder overlap AutoTP's all-reduces.

    Raises:
        ConfigError: see :func:`deepspeed_plugins.tensor_parallel.overlap`.
    """
    if engine.autotp_size() > 1 and conversion.applies(engine._config, engine.client_optimizer):
        from deepspeed_plugins.tensor_parallel import overlap

        overlap(engine.module)


def describe(settings: LadderResidual, engine: Any) -> str:
    """``"4 of 4 layers"``; under AutoTP ``", 7 of 8 all-reduces overlap the next module"``.

    Raises:
        ConfigError: the engine's model has other ladder layers.
    """

    def active(layers: int) -> str:
        line = f"{len(settings.resolve(layers))} of {layers} layers"
        if engine.autotp_size() <= 1:
            return line
        from deepspeed_plugins.tensor_parallel import AsyncLinearAllreduce

        count = sum(isinstance(each, AsyncLinearAllreduce) for each in engine.module.modules())
        return f"{line}, {count} of {2 * layers} all-reduces overlap the next module"

    return conversion.describe(settings, engine, active)
