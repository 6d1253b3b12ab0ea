"""Groups of layers that share keys and values, and the pipeline stages that must not split them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plugins.cross_layer_attention import stacks
from megatron_plugins.hybrid import pattern_of
from torch_plugins.config import ConfigError, CrossLayerAttention


@dataclass(frozen=True)
class Role:
    """What one layer does in its group. Indices are zero-based, over the whole model."""

    index: int
    producer: int
    """The layer whose keys and values this one attends to."""
    last: int
    """The last layer of the group."""
    own_norm: bool
    """It is a producer whose keys and values read a norm of their own."""

    @property
    def consumes(self) -> bool:
        return self.producer != self.index

    @property
    def plain(self) -> bool:
        """It is a layer like any other: a group of one, without a second norm."""
        return self.producer == self.last and not self.own_norm


def roles(feature: CrossLayerAttention, num_layers: int, pattern: str | None = None) -> list[Role]:
    """The role of every layer of a GPT model, or of every attention layer of a hybrid one with this
    pattern.

    Raises:
        ConfigError: the feature's values do not fit the layers.
    """
    if pattern is None:
        layers, places = feature.resolve(num_layers), list(range(num_layers))
    else:
        layers, places = stacks.producers(feature, pattern), stacks.attentions(pattern)
    last = dict(zip(layers, places, strict=True))
    separate = feature.kv_norm == "separate"
    return [
        Role(
            index=index,
            producer=places[producer],
            last=last[producer],
            own_norm=separate and places[producer] == index,
        )
        for index, producer in zip(places, layers, strict=True)
    ]


def undivided(own: Sequence[Role], num_layers: int) -> list[int]:
    """For every layer the first of those that must be in its stage: a group's producer from there
    to its last layer, elsewhere the layer itself."""
    heads = list(range(num_layers))
    for role in own:
        heads[role.producer : role.last + 1] = [role.producer] * (role.last + 1 - role.producer)
    return heads


def first_layers(config: Any) -> list[int]:
    """First layer of every pipeline stage and virtual stage, ascending; an empty stage has the
    next one's."""
    size = config.pipeline_model_parallel_size
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout.layout
        counts = [
            sum(layer.name == "decoder" for layer in layout[rank][stage])
            for stage in range(len(layout[0]))
            for rank in range(size)
        ]
        return [sum(counts[:stage]) for stage in range(len(counts))]
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    virtual = config.virtual_pipeline_model_parallel_size
    return sorted(
        get_transformer_layer_offset(config, stage, rank)
        for stage in (range(virtual) if virtual else (None,))
        for rank in range(size)
    )


def check_stages(config: Any, feature: CrossLayerAttention) -> None:
    """Keys and values do not travel between pipeline stages.

    Raises:
        ConfigError: a stage begins inside a group; the message has a layout that fits, or how many
            stages there can be.
    """
    pattern = pattern_of(config)
    if pattern is None and config.pipeline_model_parallel_size == 1:
        return
    own = roles(feature, config.num_layers, pattern)
    heads = undivided(own, config.num_layers)
    starts = first_layers(config) if pattern is None else stacks.first_layers(config, pattern)
    split = [f"{i - 1} | {i}" for i in starts if i < len(heads) and heads[i] < i]
    if not split:
        return
    producers = [str(role.index) for role in own if not role.consumes]
    raise ConfigError(
        f"{feature.flag()}: a pipeline stage begins inside a group of layers that share keys and "
        f"values, between layers {', '.join(split)}; producers are layers "
        f"{', '.join(producers)}. {_remedy(heads, len(starts), pattern)}"
    )


def _remedy(heads: Sequence[int], stages: int, pattern: str | None) -> str:
    most = len(set(heads))
    if pattern is not None:
        bounds = fitting_bounds(heads, stages)
        if bounds is not None:
            fitting = stacks.with_borders(pattern, bounds)
            return f"Use --hybrid-layer-pattern '{fitting}' without other layout flags"
        return (
            f"The stack can be divided into {most} stages at most, and {stages} are asked for: use "
            "fewer (pipeline parallel size times virtual stages), or a smaller sharing factor"
        )
    layout = fitting_layout(heads, stages)
    if layout is not None:
        return f"Use --pipeline-model-parallel-layout '{layout}' in place of the other layout flags"
    return (
        f"There are {most} groups for {stages} stages: use at most {most} stages "
        "(pipeline parallel size times virtual stages), or a smaller sharing factor"
    )


def fitting_bounds(heads: Sequence[int], stages: int) -> list[int] | None:
    """First layers of ``stages`` stages of whole groups, as even as they go; None if there are
    fewer groups than stages."""
    firsts = sorted(set(heads))
    if len(firsts) < stages:
        return None
    bounds = [0]
    for stage in range(1, stages):
        ideal = stage * len(heads) / stages
        # Leave a group for every stage still to come.
        choices = [h for h in firsts[: len(firsts) - (stages - stage) + 1] if h > bounds[-1]]
        bounds.append(min(choices, key=lambda head: abs(head - ideal)))
    return bounds


def fitting_layout(heads: Sequence[int], stages: int) -> str | None:
    """The same of a GPT model, as Megatron spells it: ``"Ett*2|tt|ttL"``."""
    bounds = fitting_bounds(heads, stages)
    if bounds is None:
        return None
    counts = [end - start for start, end in zip(bounds, [*bounds[1:], len(heads)], strict=True)]
    words = [f"t*{count}" if count > 1 else "t" for count in counts]
    return "E" + "|".join(words) + "L"
