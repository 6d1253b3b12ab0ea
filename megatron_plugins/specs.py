"""The ``--spec`` door: ``--spec megatron_plugins.specs gpt_layer_spec``.

Naming the spec imports this package, which arms the choke point; the layers are the stock ones for
the model's arguments (local or TransformerEngine, dense or MoE), rewritten by the active features.
A spec cannot add flags: the features come from theirs, which the installed entry point or
``-m megatron_plugins`` makes known. Without them, ``ladder_gpt_layer_spec`` is the ladder on all
layers.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

import megatron_plugins  # noqa: F401  (arms the choke point)
from megatron_plugins import arguments, features
from torch_plugins.config import FEATURES, ConfigError, Feature, LadderResidual

DOOR = "megatron_plugins_features"
"""Key of a door spec's ``metainfo``: the features that it switches on by itself."""


def door(*own: Feature) -> ModuleSpec:
    """A spec that stands for the stock layers with the features of the flags, or else ``own``.

    Every supported version passes a ``ModuleSpec`` on to the choke point untouched, while only
    0.19 and newer call a function; so the door is a ``ModuleSpec`` that :func:`resolve` replaces.
    """
    return ModuleSpec(module=TransformerLayer, metainfo={DOOR: own})


def resolve(config: Any, spec: Any, vp_stage: int | None, pp_rank: int | None) -> Any:
    """The stock block of the model when ``spec`` is a door, else ``spec`` itself.

    Raises:
        ConfigError: the door has no feature of its own, and no flag switched one on.
    """
    own = getattr(spec, "metainfo", None) or {}
    if DOOR not in own:
        return spec
    if not getattr(config, "megatron_plugins", None):
        if not own[DOOR]:
            flags = ", ".join(feature.flag() for feature in FEATURES)
            raise ConfigError(
                f"--spec megatron_plugins.specs gpt_layer_spec with no plugin flag ({flags}): "
                "add one, or name ladder_gpt_layer_spec"
            )
        config.megatron_plugins = {feature.key(): feature for feature in own[DOOR]}
        arguments.adopt(config.megatron_plugins)
        for feature in own[DOOR]:
            features.adapter(feature.key()).adjust_config(config, feature)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )


gpt_layer_spec = door()
ladder_gpt_layer_spec = door(LadderResidual())
