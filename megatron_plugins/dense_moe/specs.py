"""Layer specs with experts.

A TransformerEngine spec keeps the norm inside the linear behind it, and a router reads what the
norm gives: there the two are taken apart, as in stock MoE layers. Checkpoint keys of the attention
stay those of the fused linear; those of the MLP's norm are a stock MoE layer's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_plugins.dense_moe.attention import heads_class
from megatron_plugins.dense_moe.experts import experts_class
from torch_plugins.config import ConfigError, DenseMoE


def with_mlp_experts(submodules: Any, index: int) -> Any:
    """A layer's submodules, its MLP made of experts.

    Raises:
        ConfigError: the layer's MLP is not Megatron's ``MLP``.
    """
    spec = submodules.mlp
    module = spec.module if isinstance(spec, ModuleSpec) else _class_of(spec)
    if not (isinstance(module, type) and issubclass(module, MLP)):
        raise ConfigError(
            f"{DenseMoE.flag()}: the MLP of layer {index} is {_name(module or spec)}, not "
            "Megatron's MLP, whose blocks can be experts"
        )
    if _is_ours(module, experts_class):
        return submodules
    inner = _submodules(spec)
    if submodules.pre_mlp_layernorm is IdentityOp:
        inner = replace(inner, linear_fc1=_unfused().column_parallel_linear())
        submodules = replace(submodules, pre_mlp_layernorm=_unfused().layer_norm())
    made: Any = experts_class(module)
    if isinstance(spec, ModuleSpec):
        return replace(submodules, mlp=replace(spec, module=made, submodules=inner))
    options = {**spec.keywords, "submodules": inner}
    return replace(submodules, mlp=partial(made.as_mlp_submodule, *spec.args, **options))


def _is_ours(module: type, make: Any) -> bool:
    """Whether ``make`` made the class of another."""
    return any(make(base) is module for base in module.__mro__[1:2])


def _class_of(builder: Any) -> Any:
    """The class behind ``partial(MLP.as_mlp_submodule, ...)``."""
    return getattr(getattr(builder, "func", builder), "__self__", None)


def _name(found: Any) -> str:
    return getattr(found, "__name__", type(found).__name__)


def _submodules(spec: Any) -> Any:
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def _unfused() -> Any:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def with_attention_experts(submodules: Any, index: int) -> Any:
    """A layer's submodules, its query heads made experts.

    Raises:
        ConfigError: the layer's attention is not a ``SelfAttention``.
    """
    attention = submodules.self_attention
    if not issubclass(attention.module, SelfAttention):
        raise ConfigError(
            f"{DenseMoE.flag('attention_experts')}: the attention of layer {index} is "
            f"{_name(attention.module)}; heads of SelfAttention can be experts"
        )
    if _is_ours(attention.module, heads_class):
        return submodules
    keys_map, inner = dict(submodules.sharded_state_dict_keys_map), attention.submodules
    if submodules.input_layernorm is IdentityOp:
        inner = replace(inner, linear_qkv=_unfused().column_parallel_linear())
        submodules = replace(submodules, input_layernorm=_unfused().layer_norm())
        keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    attention = replace(attention, module=heads_class(attention.module), submodules=inner)
    return replace(submodules, self_attention=attention, sharded_state_dict_keys_map=keys_map)
