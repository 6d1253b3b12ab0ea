"""Groups of layers that share keys and values, and the pipeline stages that must not split them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def roles(feature: CrossLayerAttention, num_layers: int) -> list[Role]:
    """The role of every layer of the model."""
    producers = feature.resolve(num_layers)
    separate = feature.kv_norm == "separate"
    return [
        Role(
            index=index,
            producer=producer,
            last=num_layers - 1 - producers[::-1].index(producer),
            own_norm=separate and producer == index,
        )
        for index, producer in enumerate(producers)
    ]


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
    if config.pipeline_model_parallel_size == 1:
        return
    producers = feature.resolve(config.num_layers)
    starts = first_layers(config)
    split = [f"{i - 1} | {i}" for i in starts if i < len(producers) and producers[i] < i]
    if not split:
        return
    fitting = fitting_layout(producers, len(starts))
    groups = len(set(producers))
    raise ConfigError(
        f"{feature.flag()}: a pipeline stage begins inside a group of layers that share keys and "
        f"values, between layers {', '.join(split)}; producers are layers "
        f"{', '.join(map(str, sorted(set(producers))))}. "
        + (
            f"Use --pipeline-model-parallel-layout '{fitting}' in place of the other layout flags"
            if fitting
            else f"There are {groups} groups for {len(starts)} stages: use at most {groups} stages "
            "(pipeline parallel size times virtual stages), or a smaller sharing factor"
        )
    )


def fitting_layout(producers: Sequence[int], stages: int) -> str | None:
    """Whole groups over ``stages`` stages, as even as they go: ``"Ett*2|tt|ttL"``; None if there
    are fewer groups than stages."""
    heads = sorted(set(producers))
    if len(heads) < stages:
        return None
    bounds = [0]
    for stage in range(1, stages):
        ideal = stage * len(producers) / stages
        # Leave a group for every stage still to come.
        choices = [h for h in heads[: len(heads) - (stages - stage) + 1] if h > bounds[-1]]
        bounds.append(min(choices, key=lambda head: abs(head - ideal)))
    counts = [end - start for start, end in zip(bounds, [*bounds[1:], len(producers)], strict=True)]
    words = [f"t*{count}" if count > 1 else "t" for count in counts]
    return "E" + "|".join(words) + "L"
