"""The muP recipe of Power LR on Megatron-Core (arXiv 2408.13359, table 1).

Megatron's own ``--use-mup`` does most of it, with ``m = hidden_size / mup_base_hidden_size``:

============================  ====================================  ========================
                              ``--use-mup``                         ``--power-mup``
============================  ====================================  ========================
embedding output              x ``mup_embedding_mult``              the same
attention scores              / d_head                              the same
attention and MLP output      unscaled                              x residual multiplier
logits                        / m                                   the same
init of hidden matrices       std / sqrt(m)                         the same
init of output projections    std / sqrt(2 m L), L layers           the same
init of embedding and head    std                                   the same
Adam lr of hidden matrices    lr / m                                the same
Adam lr of everything else    lr, also of the head                  the same
Adam epsilon                  eps / m for hidden matrices           eps
============================  ====================================  ========================

Any flag of this feature turns ``--use-mup`` on. What ``--use-mup`` does for other optimizers stays.

The residual multiplier enters through the two bias-dropout-adds that a layer's spec names, so
whatever runs the layer (recomputation, pipeline stages, the ladder) adds a scaled output.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from megatron_plugins import parameter_groups
from megatron_plugins.refusals import Refusal
from megatron_plugins.seams import doors
from torch_plugins.config import MUP_PRESETS, ConfigError, PowerMup

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Megatron's bias-dropout-add: ``(output, bias), residual, dropout -> residual'``."""

ARGUMENTS = (
    "use_mup",
    "mup_base_hidden_size",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_base_head_dim",
    "mup_attn_scale_power",
    "init_method_std",
)
"""Megatron's own arguments that belong to the recipe. ``--use-checkpoint-args`` alone leaves them
at their defaults."""


def adjust_args(args: Namespace, feature: PowerMup, typed: Collection[str]) -> None:
    """Turn ``--use-mup`` on and give it the preset's values, except those that were ``typed``."""
    args.use_mup = True
    if feature.preset is None:
        return
    preset = MUP_PRESETS[feature.preset]
    values = {
        "mup_base_hidden_size": preset.base_width,
        "mup_embedding_mult": preset.embedding_multiplier,
        "init_method_std": preset.init_std,
    }
    for name, value in values.items():
        if name not in typed:
            setattr(args, name, value)


def validate(args: Namespace, feature: PowerMup) -> None:
    """Raise where ``--use-mup`` is off: a feature that a spec switched on came too late for it."""
    if not args.use_mup:
        raise ConfigError(
            f"{feature.flag()} needs --use-mup: add it, or give the feature as a flag"
        )


def adjust_config(config: Any, feature: PowerMup) -> None:
    """Nothing: Megatron reads the adjusted arguments."""


def multipliers(args: Namespace) -> dict[str, float]:
    """What the model multiplies by, in the names of a granite configuration.

    As ``TransformerConfig.__post_init__`` derives it, with ``m`` the width multiplier::

        attention_multiplier:  sqrt(base head dim or 1) / head_dim ** power
        logits_scaling:        1 / mup_output_mult, or m where that is left at 1
    """
    if not getattr(args, "use_mup", False):
        return {}
    output = args.mup_output_mult if args.mup_output_mult != 1.0 else 1.0 / width_multiplier(args)
    base_head_dim = args.mup_base_head_dim if args.mup_base_head_dim is not None else 1.0
    return {
        "embedding_multiplier": args.mup_embedding_mult,
        "residual_multiplier": _residual_multiplier(args),
        "attention_multiplier": base_head_dim**0.5 / args.kv_channels**args.mup_attn_scale_power,
        "logits_scaling": 1.0 / output,
    }


def width_multiplier(args: Namespace) -> float:
    """m: the width over the base model's."""
    width: float = args.hidden_size / (args.mup_base_hidden_size or args.hidden_size)
    return width


def _residual_multiplier(args: Namespace) -> float:
    from megatron_plugins.arguments import features_of

    feature = features_of(args).get(PowerMup.key())
    return feature.multiplier() if feature else 1.0


def function(args: Namespace, feature: PowerMup) -> dict[str, float]:
    """What of the recipe decides the function of a model's weights."""
    return multipliers(args)


def describe(feature: PowerMup, args: Namespace, built: Any) -> str:
    """``"4 of 4 layers, residual x 0.22, embedding x 12, ..."``.

    Raises:
        ConfigError: a layer has no residual multiplier.
    """
    from megatron_plugins import activity, layers

    wanted = range(args.num_layers) if feature.multiplier() != 1 else ()
    counted = activity.count(feature, wanted, args.num_layers, activity.gather(layers.ACTIVE))
    scales, width = multipliers(args), width_multiplier(args)
    return (
        f"{counted}, residual x {scales['residual_multiplier']:g}, "
        f"embedding x {scales['embedding_multiplier']:g}, "
        f"attention x {scales['attention_multiplier']:g}, logits / {scales['logits_scaling']:g}, "
        f"lr of hidden matrices / {width:g}, init std {args.init_method_std:g}"
    )


def transform(
    layer_specs: Sequence[Any], config: Any, feature: PowerMup, first: int
) -> Sequence[Any]:
    """Layer specs of one pipeline stage whose bias-dropout-adds scale what they add.

    Specs that have it already are returned as they are.
    """
    multiplier = feature.multiplier()
    if multiplier == 1:
        return layer_specs
    return [_with_multiplier(spec, multiplier, i) for i, spec in enumerate(layer_specs, first)]


def _with_multiplier(spec: Any, multiplier: float, index: int) -> Any:
    cross_attention = getattr(spec.submodules, "cross_attention", None)
    if cross_attention is not None and getattr(cross_attention, "__name__", "") != "IdentityOp":
        raise ConfigError(
            f"{PowerMup.flag()}: layer {index} has cross-attention, whose output the residual "
            "multiplier would not scale; it is defined for decoder-only models"
        )
    adds = {name: getattr(spec.submodules, name, None) for name in ("self_attn_bda", "mlp_bda")}
    for name, add in adds.items():
        if not isinstance(add, FunctionType):
            raise ConfigError(
                f"{PowerMup.flag()}: layer {index} has no bias-dropout-add for the residual "
                f"multiplier to scale ({name} is {add}); use layers with an attention and an MLP, "
                f"or {PowerMup.flag('residual_multiplier')} 1"
            )
    if all(hasattr(add, "residual_multiplier") for add in adds.values()):
        return spec
    scaling = {name: scaled(add, multiplier) for name, add in adds.items() if add is not None}
    return replace(spec, submodules=replace(spec.submodules, **scaling))


def scaled(
    bias_dropout_add: Callable[[bool, bool], Add], multiplier: float
) -> Callable[[bool, bool], Add]:
    """``residual + multiplier * dropout(output + bias)`` in place of ``bias_dropout_add``.

    One kernel where there is neither bias nor dropout. Otherwise output and bias are scaled and
    Megatron's own adds them, with the dropout mask it would draw anyway.
    """

    def build(training: bool, fused: bool) -> Add:
        add = bias_dropout_add(training, fused)

        def step(
            output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            output, bias = output_with_bias
            if bias is None and not (training and dropout):
                return torch.add(residual, output.to(residual.dtype), alpha=multiplier)
            bias = None if bias is None else bias * multiplier
            return add((output * multiplier, bias), residual, dropout)

        return step

    build.residual_multiplier = multiplier  # type: ignore[attr-defined]
    return build


def keep_epsilon(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``get_mup_config_overrides``: parameter groups keep Adam's epsilon as it is given."""
    overrides = original(*args, **kwargs)
    if not getattr(doors.megatron_args(), PowerMup.key(), False):
        return overrides
    parameter_groups.tell_apart()
    kept = {
        parameters: {name: value for name, value in override.items() if name != "eps"}
        for parameters, override in overrides.items()
    }
    return {parameters: override for parameters, override in kept.items() if override}


def _any_of(*names: str) -> Callable[[Namespace], bool]:
    return lambda args: any(bool(getattr(args, name, None)) for name in names)


def _with_own_scale(name: str) -> Callable[[Namespace], bool]:
    """An attention that always divides its scores by sqrt(d_head), where muP wants another scale.

    Megatron itself ignores ``--use-mup`` there without a word.
    """

    def when(args: Namespace) -> bool:
        standard = args.mup_attn_scale_power == 0.5 and args.mup_base_head_dim is None
        return bool(getattr(args, name, None)) and not standard

    return when


_SQRT = (
    "this attention divides its scores by sqrt(d_head) whatever --use-mup says; "
    "--mup-attn-scale-power 0.5 asks for just that"
)

REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "--mtp-num-layers",
        _any_of("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would add unscaled outputs",
    ),
    Refusal(
        "--hybrid-layer-pattern",
        _any_of("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"),
        "a hybrid stack builds its own layers, which would add unscaled outputs",
    ),
    Refusal(
        "--enable-mhc-connections",
        _any_of("enable_mhc_connections"),
        "hyper-connections replace the residual stream whose additions are scaled",
    ),
    Refusal(
        "--inference-fuse-tp-communication",
        _any_of("inference_fuse_tp_communication"),
        "it adds the residual inside the reduction, unscaled",
    ),
    Refusal("--multi-latent-attention", _with_own_scale("multi_latent_attention"), _SQRT),
    Refusal("--flash-decode", _with_own_scale("flash_decode"), _SQRT),
    Refusal("--inference-dynamic-batching", _with_own_scale("inference_dynamic_batching"), _SQRT),
    Refusal("--perform-rl-step", _with_own_scale("perform_rl_step"), _SQRT),
)
