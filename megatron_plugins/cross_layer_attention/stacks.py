"""Cross-Layer Attention on hybrid stacks (arXiv 2405.12981), whose layers are one module each.

Groups are of attention layers ``*``, which are counted by themselves: a sharing factor takes
neighbours among them, and a list of ``--cla-pattern`` has one producer for each. So the stack
``*-*-*-*-`` computes what a GPT of four layers does with the same flags. Layers of other kinds lie
between the layers of a group and stay as they are. Errors, checkpoints and the line at the start of
a run number layers as the stack does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_plugins.config import ConfigError, CrossLayerAttention

ATTENTION, BORDER = "*", "|"


def attentions(pattern: str) -> list[int]:
    """Attention layers of a pattern, which may have borders of pipeline stages."""
    return [i for i, symbol in enumerate(pattern.replace(BORDER, "")) if symbol == ATTENTION]


def producers(feature: CrossLayerAttention, pattern: str) -> tuple[int, ...]:
    """The producer of every attention layer, both counted among these.

    Raises:
        ConfigError: there is no attention layer, or the feature's values do not fit their number.
    """
    count = len(attentions(pattern))
    if not count:
        raise ConfigError(
            f"{feature.flag()} with --hybrid-layer-pattern {pattern}: it has no attention layer *, "
            f"whose keys and values could be shared; drop {feature.flag()}"
        )
    try:
        return feature.resolve(count)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; of a hybrid model only attention layers * are counted, and "
            f"--hybrid-layer-pattern {pattern} has {count}"
        ) from None


def first_layers(config: Any, pattern: str) -> list[int]:
    """First layer of every pipeline stage and virtual stage, as upstream divides a pattern: at its
    borders, or evenly but for a first and last stage of a given size."""
    counts = [len(segment) for segment in pattern.split(BORDER)]
    stages = config.pipeline_model_parallel_size
    if len(counts) == 1 and stages > 1:
        ends = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
        first, last = ([] if end is None else [end] for end in ends)
        inner = stages - len(first) - len(last)
        each = (counts[0] - sum(first) - sum(last)) // max(inner, 1)
        counts = [*first, *[each] * inner, *last]
    return [sum(counts[:stage]) for stage in range(len(counts))]


def with_borders(pattern: str, bounds: Sequence[int]) -> str:
    """The pattern with a border before each of these layers but the first."""
    symbols = pattern.replace(BORDER, "")
    ends = [*bounds[1:], len(symbols)]
    return BORDER.join(symbols[start:end] for start, end in zip(bounds, ends, strict=True))
