"""Megatron's own MoE layers with a checkpoint of ours: sparse evaluation under expert parallelism.

A stock layer that takes the softmax before it chooses K experts, and does not scale the scores
afterwards, is top-k inference of DS-MoE; with all N experts it is the dense form.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from torch_plugins.config import ConfigError, DenseMoE

Rule = tuple[str, Callable[[Namespace], bool], str]


def in_stock(feature: DenseMoE, saved: Namespace, args: Namespace) -> bool:
    """Whether a run without the feature has stock MoE layers that compute the same.

    Args:
        saved: arguments of the checkpoint.
        args: of the run.

    Raises:
        ConfigError: it has stock MoE layers, and they compute something else.
    """
    if not getattr(args, "num_experts", None):
        return False
    wrong = [f"{flag}: {why}" for flag, fits, why in _rules(feature, saved) if not fits(args)]
    if wrong:
        raise ConfigError(
            f"the checkpoint has {feature.flag()}, and --num-experts {args.num_experts} cannot "
            "compute it:\n  " + "\n  ".join(wrong) + f"\nChange these, or give {feature.flag()}'s "
            "own flags"
        )
    return True


def _rules(feature: DenseMoE, saved: Namespace) -> list[Rule]:
    """Flag, whether a run's arguments fit, and what they must be."""
    experts = feature.num_experts or 0
    width = saved.ffn_hidden_size // experts if experts else 0

    def off(name: str) -> Callable[[Namespace], bool]:
        return lambda args: getattr(args, name, None) in (None, False, 0, 1.0)

    return [
        (
            feature.flag("attention_experts"),
            lambda args: not feature.attention_experts,
            "a stock attention has none",
        ),
        (
            feature.flag("router"),
            lambda args: feature.router == "linear",
            f"a stock router is linear, the checkpoint's is {feature.router}",
        ),
        ("--num-experts", lambda args: args.num_experts == experts, f"the checkpoint's {experts}"),
        (
            "--moe-ffn-hidden-size",
            lambda args: (args.moe_ffn_hidden_size or args.ffn_hidden_size) == width,
            f"the checkpoint's {width}",
        ),
        (
            "--swiglu",
            lambda args: bool(args.swiglu) == bool(feature.gated),
            "as in the checkpoint" if feature.gated else "the checkpoint's experts are GELU",
        ),
        ("--disable-bias-linear", lambda args: not args.add_bias_linear, "experts have no biases"),
        (
            "--moe-router-pre-softmax",
            lambda args: args.moe_router_pre_softmax or args.moe_router_topk == experts,
            "a softmax after the choice would renormalize the scores",
        ),
        (
            "--moe-router-score-function",
            lambda args: args.moe_router_score_function == "softmax",
            "scores are a softmax",
        ),
        (
            "--moe-layer-freq",
            lambda args: args.moe_layer_freq in (1, [1]),
            "all layers have experts",
        ),
        (
            "--moe-router-load-balancing-type",
            lambda args: "sinkhorn" not in args.moe_router_load_balancing_type,
            "sinkhorn changes the choice",
        ),
        *(
            (flag, off(flag[2:].replace("-", "_")), "it changes the choice or the scores")
            for flag in (
                "--moe-router-topk-scaling-factor",
                "--moe-router-num-groups",
                "--moe-expert-capacity-factor",
                "--moe-shared-expert-intermediate-size",
                "--moe-router-enable-expert-bias",
            )
        ),
    ]
