"""Ladder Residual on Megatron-Core's transformer layers (arXiv 2501.06589)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_plugins.hybrid import pattern
from megatron_plugins.ladder_residual.layer import Position, Stage, ladder_layer_class, positions
from megatron_plugins.ladder_residual.refused import REFUSED
from megatron_plugins.ladder_residual.stacks import check
from torch_plugins.config import ConfigError, LadderResidual

__all__ = ["REFUSED", "adjust_config", "transform", "transform_stack", "validate"]


def transform(
    layer_specs: Sequence[Any], config: Any, feature: LadderResidual, first: int
) -> Sequence[Any]:
    """Layer specs of one pipeline stage, beginning at global layer ``first``, with the ladder.

    Specs that have it already are returned as they are.
    """
    if any("ladder" in (spec.params or {}) for spec in layer_specs):
        return layer_specs
    stage = Stage()
    places = positions(feature.resolve(config.num_layers), first, len(layer_specs))
    return [
        _with_ladder(spec, place, stage) if place.ladder or place.hands_over else spec
        for spec, place in zip(layer_specs, places, strict=True)
    ]


def transform_stack(
    layer_specs: Sequence[Any],
    symbols: Sequence[str],
    config: Any,
    feature: LadderResidual,
    first: int,
) -> Sequence[Any]:
    """The same for a stage of a hybrid stack, given the kinds of its layers.

    Raises:
        ConfigError: see :func:`~megatron_plugins.ladder_residual.stacks.check`.
    """
    check(symbols, feature.resolve(config.num_layers), config.num_layers, first)
    return transform(layer_specs, config, feature, first)


def _with_ladder(spec: Any, place: Position, stage: Stage) -> Any:
    cross_attention = getattr(spec.submodules, "cross_attention", None)
    if cross_attention is not None and getattr(cross_attention, "__name__", "") != "IdentityOp":
        raise ConfigError(
            f"{LadderResidual.flag()}: layer {place.index} has cross-attention; "
            "the ladder is defined for decoder-only models"
        )
    params = {**(spec.params or {}), "ladder": place, "stage": stage}
    return replace(spec, module=ladder_layer_class(spec.module), params=params)


def validate(args: Namespace, feature: LadderResidual) -> None:
    """Refuse a ladder without layers, or of layers that cannot be one, before anything is built."""
    ladder, symbols = feature.resolve(args.num_layers), pattern(args)
    if not ladder:
        raise ConfigError(
            f"{feature.flag()} with {feature.flag('layers')} {feature.layers!r} has no ladder "
            f"layer: name at least one of 0 to {args.num_layers - 1}, or drop {feature.flag()}"
        )
    if symbols is not None:
        check(symbols, ladder, args.num_layers)


def adjust_config(config: Any, feature: LadderResidual) -> None:
    """Let pipeline stages exchange the shape of what they send: [s, b, 2h] at a ladder boundary."""
    if config.pipeline_model_parallel_size > 1:
        config.variable_seq_lengths = True
