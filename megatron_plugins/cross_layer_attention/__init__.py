"""Cross-Layer Attention on Megatron-Core's transformer layers (arXiv 2405.12981).

A producer projects keys and values as ever; the consumers behind it in its group have queries only,
and attend to the producer's keys and values. Consumers have no parameters for them: their
``linear_qkv`` is as wide as the queries. Checkpoints are numbered by layer, since layers differ.
On hybrid stacks: ``stacks.py``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_plugins.cross_layer_attention.attention import (
    consumer_class,
    own_norm_class,
    producer_class,
    sharing_layer_class,
)
from megatron_plugins.cross_layer_attention.groups import Role, check_stages, roles
from megatron_plugins.cross_layer_attention.migration import translate
from megatron_plugins.cross_layer_attention.refused import REFUSED
from megatron_plugins.cross_layer_attention.stacks import attentions
from megatron_plugins.hybrid import pattern, pattern_of
from torch_plugins.config import ConfigError, CrossLayerAttention

__all__ = [
    "CONVERTS",
    "REFUSED",
    "adjust_config",
    "describe",
    "function",
    "transform",
    "transform_stack",
    "translate",
    "validate",
]

CONVERTS = True
"""``python -m megatron_plugins.convert`` makes its checkpoints of standard ones."""


def transform(
    layer_specs: Sequence[Any], config: Any, feature: CrossLayerAttention, first: int
) -> Sequence[Any]:
    """Layer specs of one pipeline stage, beginning at global layer ``first``, with their roles.

    A group of one layer stays as it is, unless it has a norm of its own; specs that have their
    roles already are returned as they are.

    Raises:
        ConfigError: a layer's attention is not a ``SelfAttention``, or its producer is in another
            stage.
    """
    if any("role" in _attention(spec).params for spec in layer_specs):
        return layer_specs
    check_stages(config, feature)
    return _with_roles(layer_specs, roles(feature, config.num_layers), first)


def transform_stack(
    layer_specs: Sequence[Any],
    symbols: Sequence[str],
    config: Any,
    feature: CrossLayerAttention,
    first: int,
) -> Sequence[Any]:
    """The same for a stage of a hybrid stack: of its attention layers.

    Raises:
        ConfigError: as :func:`transform`; or what lies before or behind the stage is not known.
    """
    pattern = pattern_of(config)
    if pattern is None:
        raise ConfigError(
            f"{feature.flag()}: layers {first} to {first + len(symbols) - 1} are one stage of a "
            "hybrid model, and the others decide about groups too: set "
            "config.megatron_plugins_pattern to the pattern of the model, with its borders |"
        )
    check_stages(config, feature)
    return _with_roles(layer_specs, roles(feature, config.num_layers, pattern), first)


def _with_roles(layer_specs: Sequence[Any], own: Sequence[Role], first: int) -> Sequence[Any]:
    sharing = {role.index: role for role in own if not role.plain}
    return [
        _with_role(spec, sharing[index]) if index in sharing else spec
        for index, spec in enumerate(layer_specs, first)
    ]


def _attention(spec: Any) -> Any:
    return spec.submodules.self_attention


def _with_role(spec: Any, role: Role) -> Any:
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.identity_op import IdentityOp

    attention, submodules = _attention(spec), spec.submodules
    if not issubclass(attention.module, SelfAttention):
        raise ConfigError(
            f"{CrossLayerAttention.flag()}: layer {role.index} has an attention of another kind, "
            f"{attention.module.__name__}; keys and values of SelfAttention can be shared"
        )
    params = {**attention.params, "role": role}
    keys_map = dict(submodules.sharded_state_dict_keys_map)
    if role.consumes:
        make = consumer_class
    elif role.own_norm:
        make = own_norm_class
        fused = submodules.input_layernorm is IdentityOp  # then linear_qkv contains the norm
        params["kv_norm"] = None if fused else submodules.input_layernorm
        keys_map["self_attention.kv_norm."] = "self_attention.linear_kv.layer_norm_"
    else:
        make = producer_class
    submodules = replace(
        submodules,
        self_attention=replace(attention, module=make(attention.module), params=params),
        sharded_state_dict_keys_map=keys_map,
    )
    return replace(spec, module=sharing_layer_class(spec.module), submodules=submodules)


def validate(args: Namespace, feature: CrossLayerAttention) -> None:
    """Check groups against the model, before anything is built.

    Raises:
        ConfigError: the pattern does not fit the layers, or a group mixes layers with and without
            rotary embedding.
    """
    rotated = _layers_without_rope(args)
    for role in roles(feature, args.num_layers, pattern(args)):
        if rotated[role.index] != rotated[role.producer]:
            raise ConfigError(
                f"{feature.flag()} with --no-rope-freq {args.no_rope_freq}: layers "
                f"{role.producer} and {role.index} share keys, and only one of them rotates its "
                "queries; give the layers of a group the same"
            )


def _layers_without_rope(args: Namespace) -> list[bool]:
    """As Megatron reads ``--no-rope-freq``: every N-th layer, or a list of 0 and 1."""
    freq = getattr(args, "no_rope_freq", None)
    layers = range(args.num_layers)
    if isinstance(freq, int):
        return [(layer + 1) % freq == 0 for layer in layers]
    return [bool(flag) for flag in freq] if freq else [False for _ in layers]


def adjust_config(config: Any, feature: CrossLayerAttention) -> None:
    """Number the layers in checkpoints; refuse pipeline stages that split a group.

    Raises:
        ConfigError: see :func:`~megatron_plugins.cross_layer_attention.groups.check_stages`.
    """
    check_stages(config, feature)
    config.hetereogenous_dist_checkpoint = True  # upstream's spelling


def function(args: Namespace, feature: CrossLayerAttention) -> Any:
    """The producer of every layer with attention, counted among these, and the norm."""
    symbols = pattern(args)
    if symbols is None:
        return feature.function(args.num_layers)
    return feature.function(len(attentions(symbols)))


def describe(feature: CrossLayerAttention, run: Namespace, built: Any) -> str:
    """``"2 of 4 layers share keys and values (producers 0, 2)"``, once they are found to."""
    from megatron_plugins import activity, layers

    symbols = pattern(run)
    own = roles(feature, run.num_layers, symbols)
    active = activity.gather(layers.ACTIVE)
    activity.count(feature, [r.index for r in own if not r.plain], run.num_layers, active)
    producers = ", ".join(str(role.index) for role in own if not role.consumes)
    consumers = sum(role.consumes for role in own)
    kind = "layers" if symbols is None else "attention layers"
    line = f"{consumers} of {len(own)} {kind} share keys and values (producers {producers})"
    return line + (", kv norm of their own" if feature.kv_norm == "separate" else "")
