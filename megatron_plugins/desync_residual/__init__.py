"""Desync Residual on Megatron-Core's transformer layers (the sibling of Ladder Residual in the code
of arXiv 2501.06589).

Checkpoints are numbered by layer, since layers differ, and belong to one tensor-parallel size: each
rank's norms are its own, and stored one rank after another.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from megatron_plugins.desync_residual.refused import REFUSED
from torch_plugins.config import ConfigError, DesyncResidual

__all__ = ["REFUSED", "adjust_args", "adjust_config", "describe", "transform", "validate"]


def adjust_args(args: Namespace, feature: DesyncResidual, typed: Collection[str]) -> None:
    """Each tensor-parallel rank has a stream, unless another number was typed."""
    if feature.ranks is None and args.tensor_model_parallel_size > 1:
        args.desync_ranks = args.tensor_model_parallel_size


def validate(args: Namespace, feature: DesyncResidual) -> None:
    """Check ranks and pattern, before anything is built.

    Raises:
        ConfigError: there is one rank, or not as many as the streams; the pattern does not fit.
    """
    size = args.tensor_model_parallel_size
    if size == 1 and feature.ranks is None:
        raise ConfigError(
            f"{feature.flag()} with --tensor-model-parallel-size 1: the streams are those of "
            "tensor-parallel ranks; use at least 2 of them"
        )
    if feature.ranks != size:
        raise ConfigError(
            f"{feature.flag('ranks')} {feature.ranks} with --tensor-model-parallel-size {size}: "
            f"each rank has one stream, and the model is another one with more or fewer; use "
            f"--tensor-model-parallel-size {feature.ranks}"
        )
    feature.resolve(args.num_layers)


def adjust_config(config: Any, feature: DesyncResidual) -> None:
    """Number the layers in checkpoints; let pipeline stages exchange the shape of what they send,
    [s, b, h] of a rank's own stream even where sequence parallelism divides others."""
    config.hetereogenous_dist_checkpoint = True  # upstream's spelling
    if config.pipeline_model_parallel_size > 1 and config.sequence_parallel:
        config.variable_seq_lengths = True


def transform(
    layer_specs: Sequence[Any], config: Any, feature: DesyncResidual, first: int
) -> Sequence[Any]:
    """Layer specs of one pipeline stage with their places; standard layers, and specs that have
    their places already, are returned as they are."""
    places = feature.places(config.num_layers)
    return [
        _with_places(spec, places[2 * index], places[2 * index + 1])
        for index, spec in enumerate(layer_specs, first)
    ]


def _with_places(spec: Any, attention: Any, mlp: Any) -> Any:
    from megatron_plugins import unfused
    from megatron_plugins.desync_residual.layer import desync_layer_class

    if "desync" in (spec.params or {}) or not (attention.inside or mlp.inside):
        return spec
    submodules = spec.submodules
    if attention.inside:
        submodules = unfused.attention(submodules)
    if mlp.inside:
        submodules = unfused.mlp(submodules, unfused.FC1_KEYS)
    params = {**(spec.params or {}), "desync": (attention, mlp)}
    return replace(
        spec, module=desync_layer_class(spec.module), submodules=submodules, params=params
    )


def describe(feature: DesyncResidual, run: Namespace, built: Any) -> str:
    """``"2 of 4 modules reduce, 2 streams of their own"``, once they are found to."""
    from megatron_plugins import activity, layers

    places = feature.places(run.num_layers)
    wanted = [
        index for index in range(run.num_layers) if any(p.inside for p in places[2 * index :][:2])
    ]
    activity.count(feature, wanted, run.num_layers, activity.gather(layers.ACTIVE))
    reduces = sum(feature.resolve(run.num_layers))
    return f"{reduces} of {2 * run.num_layers} modules reduce, {feature.ranks} streams"
