"""DS-MoE on Megatron-Core's transformer layers (arXiv 2404.05567).

An MLP of N experts is Megatron's own MLP of width N F with a router, and a mixture of attention
heads is its own grouped-query attention with another: neither has a dispatcher or a capacity, and
tensor parallelism is the only expert parallelism there is. Checkpoints have the keys of stock MoE
layers.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from megatron_plugins.dense_moe.refused import REFUSED
from megatron_plugins.dense_moe.stock import in_stock
from torch_plugins.config import ConfigError, DenseMoE
from torch_plugins.dense_moe_config import DENSE_MOE_PRESETS

__all__ = [
    "ARGUMENTS",
    "REFUSED",
    "adjust_args",
    "adjust_config",
    "describe",
    "in_stock",
    "transform",
    "validate",
]

ARGUMENTS = (
    "ffn_hidden_size",
    "swiglu",
    "bias_gelu_fusion",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
)
"""What :func:`adjust_args` sets that decides the function of the weights."""


def adjust_args(args: Namespace, feature: DenseMoE, typed: Collection[str]) -> None:
    """Give Megatron the sizes that follow: of a preset's model, of the wide MLP, of the key-value
    heads.

    Raises:
        ConfigError: a size was typed that contradicts them.
    """
    for name, value in _of_preset(feature).items():
        if name not in typed:
            setattr(args, name, value)
    if feature.num_experts:
        _size_experts(args, feature, typed)
    heads = args.num_attention_heads
    if feature.attention_experts and heads:
        groups, rest = divmod(heads, feature.attention_experts)
        if rest:
            raise ConfigError(
                f"{feature.spelled('attention_experts')} {feature.attention_experts}: "
                f"--num-attention-heads {heads} is not a multiple of it"
            )
        _set(args, "num_query_groups", groups, typed, feature, "attention_experts")
        args.group_query_attention = True


def _of_preset(feature: DenseMoE) -> dict[str, int]:
    if feature.preset is None:
        return {}
    preset = DENSE_MOE_PRESETS[feature.preset]
    return {
        "num_layers": preset.num_layers,
        "hidden_size": preset.hidden_size,
        "num_attention_heads": preset.attention_experts * preset.heads,
        "kv_channels": preset.head_dim,
    }


def _size_experts(args: Namespace, feature: DenseMoE, typed: Collection[str]) -> None:
    """Width of the MLP, and its activation: gated experts are ``--swiglu``."""
    if args.swiglu and "swiglu" in typed and not feature.gated:
        raise ConfigError(
            f"--swiglu with {feature.flag('num_experts')} {feature.num_experts}: the paper's "
            f"experts are GELU; say {feature.flag('gated')} for SwiGLU experts, or drop --swiglu"
        )
    args.swiglu = feature.gated
    if not feature.gated:
        args.bias_gelu_fusion = False  # there is no bias
    if feature.ffn_hidden_size is not None:
        assert feature.num_experts is not None
        width = feature.num_experts * feature.ffn_hidden_size
        _set(args, "ffn_hidden_size", width, typed, feature, "ffn_hidden_size")
    elif args.ffn_hidden_size is None:
        raise ConfigError(
            f"{feature.flag('num_experts')} {feature.num_experts} without a width: give "
            f"{feature.flag('ffn_hidden_size')}, the width of one expert"
        )


def _set(
    args: Namespace, name: str, value: int, typed: Collection[str], feature: DenseMoE, source: str
) -> None:
    given = getattr(args, name)
    if name in typed and given != value:
        raise ConfigError(
            f"--{name.replace('_', '-')} {given}: {feature.flag(source)} "
            f"{getattr(feature, source)} makes it {value}; drop one of them"
        )
    setattr(args, name, value)


def validate(args: Namespace, feature: DenseMoE) -> None:
    """Check experts against the model and its processes, before anything is built.

    Raises:
        ConfigError: names flag, value and remedy.
    """
    processes = args.tensor_model_parallel_size
    experts, width = feature.num_experts, args.ffn_hidden_size
    if experts and width % experts:
        raise ConfigError(
            f"{feature.flag('num_experts')} {experts}: --ffn-hidden-size {width} is not a multiple "
            f"of it; give {feature.flag('ffn_hidden_size')}, the width of one expert"
        )
    if experts and experts % processes:
        raise ConfigError(
            f"{feature.flag('num_experts')} {experts} with --tensor-model-parallel-size "
            f"{processes}: each process has whole experts; use a size that divides them"
        )


def adjust_config(config: Any, feature: DenseMoE) -> None:
    """Nothing: the wide MLP and the heads are in the arguments already."""


def transform(
    layer_specs: Sequence[Any], config: Any, feature: DenseMoE, first: int
) -> Sequence[Any]:
    """Layer specs of one pipeline stage with experts; those that have them are returned as they
    are."""
    return [_with_experts(spec, config, feature, first + i) for i, spec in enumerate(layer_specs)]


def _with_experts(spec: Any, config: Any, feature: DenseMoE, index: int) -> Any:
    from megatron_plugins.dense_moe import specs

    submodules = spec.submodules
    if feature.num_experts:
        submodules = specs.with_mlp_experts(submodules, index)
    if feature.attention_experts:
        submodules = specs.with_attention_experts(submodules, index)
    return spec if submodules is spec.submodules else replace(spec, submodules=submodules)


def describe(feature: DenseMoE, run: Namespace, built: Any) -> str:
    """``"4 of 4 layers, 8 experts of width 32, 4 attention experts of 2 heads"``, once they are
    found to be."""
    from megatron_plugins import activity, layers

    everywhere = activity.gather(layers.ACTIVE)
    line = activity.count(feature, range(run.num_layers), run.num_layers, everywhere)
    if feature.num_experts:
        width = run.ffn_hidden_size // feature.num_experts
        kind = "SwiGLU " if feature.gated else ""
        line += f", {feature.num_experts} {kind}experts of width {width}"
    if feature.attention_experts:
        heads = run.num_attention_heads // feature.attention_experts
        line += f", {feature.attention_experts} attention experts of {heads} heads"
    return line + f", {feature.router} routers"
