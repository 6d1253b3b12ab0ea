"""Desync Residual from DeepSpeed's JSON (the sibling of Ladder Residual in the code of arXiv
2501.06589)::

    "deepspeed_plugins": {"desync_residual": {"pattern": "4x", "ranks": 2}}

Under ZeRO each process computes what all of the tensor-parallel ranks would: the function of the
model is that of a tensor-parallel training, and there is no communication to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed_plugins import conversion
from torch_plugins.config import ConfigError, DesyncResidual


def validate(settings: DesyncResidual, engine_arguments: Mapping[str, Any]) -> None:
    """Refuse a model that the ranks cannot divide, and AutoTP.

    Raises:
        ConfigError: names the key of the JSON, its value and the remedy.
    """
    section = f"{conversion.SECTION}.{settings.key()}"
    if settings.ranks is None:
        raise ConfigError(
            f"{section}.ranks: missing; give the number of tensor-parallel ranks whose streams "
            "the model has"
        )
    size = engine_arguments["config_class"].tensor_parallel_config.autotp_size
    if size > 1:
        raise ConfigError(
            f"{section} with tensor_parallel.autotp_size {size}: each process computes all ranks; "
            "drop tensor_parallel and use ZeRO, or train with Megatron"
        )
    layers = conversion.layers_of(engine_arguments["model"])
    if layers:
        settings.resolve(layers)


def describe(settings: DesyncResidual, engine: Any) -> str:
    """``"2 of 8 modules reduce, 2 streams"``.

    Raises:
        ConfigError: the engine's model has another pattern.
    """

    def active(layers: int) -> str:
        reduces = sum(settings.resolve(layers))
        return f"{reduces} of {2 * layers} modules reduce, {settings.ranks} streams"

    return conversion.describe(settings, engine, active)
