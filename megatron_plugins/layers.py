"""The choke point: every GPT model of every launcher gets its layer specs from one function,
``transformer_block._get_block_submodules``, and active features rewrite them here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_plugins import features

ACTIVE: dict[str, set[int]] = {}
"""Global indices of the layers rewritten in this process, by feature key."""


def block_submodules(
    original: Any, config: Any, spec: Any, vp_stage: int | None = None, pp_rank: int | None = None
) -> Any:
    """Submodules of one transformer block, its layer specs rewritten by the active features."""
    from megatron_plugins import specs

    spec = specs.resolve(config, spec, vp_stage, pp_rank)
    submodules = original(config, spec, vp_stage, pp_rank)
    active = getattr(config, "megatron_plugins", None)
    if not active:
        return submodules
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    layer_specs = submodules.layer_specs
    for key, feature in active.items():
        transform = getattr(features.adapter(key), "transform", None)
        if transform is not None:
            stock, layer_specs = layer_specs, transform(layer_specs, config, feature, first)
            rewritten = (old is not new for old, new in zip(stock, layer_specs, strict=True))
            ACTIVE.setdefault(key, set()).update(i for i, new in enumerate(rewritten, first) if new)
    return replace(submodules, layer_specs=layer_specs)
