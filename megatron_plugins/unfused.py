"""Norm and linear taken apart in TransformerEngine's specs.

TransformerEngine's GPT layers keep a norm inside the linear behind it, so that what the linear
multiplies is never seen. Stock MoE layers and ModelOpt's keep the two apart, as these do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

QKV_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
FC1_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""Checkpoint keys of the fused linears, for ``sharded_state_dict_keys_map``."""


def attention(submodules: Any) -> Any:
    """A layer's submodules, the norm ahead of its attention apart, under the fused one's keys."""
    if submodules.input_layernorm is not IdentityOp:
        return submodules
    spec = submodules.self_attention
    inner = replace(spec.submodules, linear_qkv=_provider().column_parallel_linear())
    return replace(
        submodules,
        self_attention=replace(spec, submodules=inner),
        input_layernorm=NormOfLinear,
        sharded_state_dict_keys_map={**submodules.sharded_state_dict_keys_map, **QKV_KEYS},
    )


def mlp(submodules: Any, keys: dict[str, str]) -> Any:
    """A layer's submodules, the norm ahead of its MLP apart.

    Args:
        keys: :data:`FC1_KEYS`, or none where the norm has keys of its own, as in stock MoE layers.
    """
    if submodules.pre_mlp_layernorm is not IdentityOp:
        return submodules
    inner = replace(mlp_submodules(submodules.mlp), linear_fc1=_provider().column_parallel_linear())
    return replace(
        submodules,
        mlp=with_submodules(submodules.mlp, inner),
        pre_mlp_layernorm=NormOfLinear if keys else _provider().layer_norm(),
        sharded_state_dict_keys_map={**submodules.sharded_state_dict_keys_map, **keys},
    )


class NormOfLinear:
    """Builds a norm that is stored as part of a linear: without an extra state of its own, which a
    checkpoint of stock layers does not have."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        norm: Any = _provider().layer_norm()(*args, **kwargs)
        own: Any = type(norm)
        norm.__class__ = _weights_only_class(own)
        return norm


@cache
def _weights_only_class(base: Any) -> type:
    class WeightsOnly(base):
        get_extra_state = torch.nn.Module.get_extra_state
        set_extra_state = torch.nn.Module.set_extra_state

    WeightsOnly.__name__ = WeightsOnly.__qualname__ = base.__name__
    return WeightsOnly


def mlp_submodules(spec: Any) -> Any:
    """Of an MLP's spec, which is a ``ModuleSpec`` or a partial."""
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def with_submodules(spec: Any, submodules: Any) -> Any:
    if isinstance(spec, ModuleSpec):
        return replace(spec, submodules=submodules)
    return partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})


def _provider() -> Any:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
