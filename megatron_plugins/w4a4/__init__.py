"""W4A4 on Megatron-Core's tensor-parallel linears (arXiv 2404.03605).

Layers are built as ever, and their linears become quantizing ones; see
:mod:`megatron_plugins.w4a4.linears`. Checkpoints have the keys of the layers without it, and clips.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron_plugins.w4a4.loading import put_back, set_aside
from megatron_plugins.w4a4.refused import REFUSED
from torch_plugins.config import W4A4, ConfigError

__all__ = [
    "REFUSED",
    "adjust_config",
    "describe",
    "put_back",
    "set_aside",
    "transform",
    "validate",
]


def validate(args: Namespace, feature: W4A4) -> None:
    """Refuse patterns that name no linear of a GPT model, before anything is built.

    Raises:
        ConfigError: names flag, value and remedy.
    """
    from megatron_plugins.w4a4.layer import names

    if not any(feature.selects(name) for i in range(args.num_layers) for name in names(i)):
        raise ConfigError(
            f"{feature.flag('modules')} {feature.modules!r}: matches no linear layer; names are "
            f"such as {', '.join(names(0)[:4])}"
        )


def adjust_config(config: Any, feature: W4A4) -> None:
    """Number the layers in checkpoints where not all have the same clips."""
    from megatron_plugins.w4a4.layer import names

    def chosen(index: int) -> list[bool]:
        return [feature.selects(name) for name in names(index)]

    if feature.learned and any(chosen(i) != chosen(0) for i in range(config.num_layers)):
        config.hetereogenous_dist_checkpoint = True  # upstream's spelling


def transform(layer_specs: Sequence[Any], config: Any, feature: W4A4, first: int) -> Sequence[Any]:
    """Layer specs of one pipeline stage with quantizing linears; those that have them, or none of
    whose linears is selected, are returned as they are."""
    from megatron_plugins.w4a4 import layer

    return [layer.quantized(spec, feature, first + i) for i, spec in enumerate(layer_specs)]


def describe(feature: W4A4, run: Namespace, built: Any) -> str:
    """``"28 linear layers in 7 of 8 layers, inputs 4 bits (learned clips, percentile:99.9),
    kurtosis 1e-05"``, once they are found to be; and set them to work.

    Raises:
        ConfigError: a layer that should have some has none.
    """
    from megatron_plugins import activity, layers
    from megatron_plugins.w4a4 import calibration
    from megatron_plugins.w4a4.layer import COUNTS, names

    wanted = [i for i in range(run.num_layers) if any(map(feature.selects, names(i)))]
    everywhere = activity.gather(layers.ACTIVE)
    line = activity.count(feature, wanted, run.num_layers, everywhere)
    counts = activity.gather({str(index): {count} for index, count in COUNTS.items()})
    linears = sum(max(found) for found in counts.values())
    if not linears:
        raise ConfigError(
            f"{feature.flag('modules')} {feature.modules!r}: matches no linear layer of this model"
        )
    calibration.prepare(built[0], feature, getattr(run, "iteration", 0))
    return f"{linears} linear layers in {line}, {feature.summary()}"
