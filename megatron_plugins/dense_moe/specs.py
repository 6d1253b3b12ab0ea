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
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_plugins import unfused
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
    submodules = unfused.mlp(submodules, {})
    spec, made = submodules.mlp, experts_class(module)
    if isinstance(spec, ModuleSpec):
        return replace(submodules, mlp=replace(spec, module=made))
    built: Any = made
    return replace(submodules, mlp=partial(built.as_mlp_submodule, *spec.args, **spec.keywords))


def _is_ours(module: type, make: Any) -> bool:
    """Whether ``make`` made the class of another."""
    return any(make(base) is module for base in module.__mro__[1:2])


def _class_of(builder: Any) -> Any:
    """The class behind ``partial(MLP.as_mlp_submodule, ...)``."""
    return getattr(getattr(builder, "func", builder), "__self__", None)


def _name(found: Any) -> str:
    return getattr(found, "__name__", type(found).__name__)


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
    submodules = unfused.attention(submodules)
    attention = submodules.self_attention
    attention = replace(attention, module=heads_class(attention.module))
    return replace(submodules, self_attention=attention)
