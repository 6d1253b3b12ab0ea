"""The models of cla_cases.py: a feature, ladder layers or None, options of the configuration."""

from __future__ import annotations

from typing import Any

from tests.megatron.ladder_table import BF16, LLAMA, MOE, SP
from torch_plugins.config import CrossLayerAttention

CLA2, CLA3 = CrossLayerAttention(2), CrossLayerAttention(3)
ONE_GROUP = CrossLayerAttention(pattern="0,0,0,0")
ENDS = CrossLayerAttention(pattern="keep-ends")
SEPARATE = CrossLayerAttention(2, kv_norm="separate")
SEPARATE_3 = CrossLayerAttention(3, kv_norm="separate")
SEPARATE_ALONE = CrossLayerAttention(1, kv_norm="separate")

MHA, MQA = dict(num_query_groups=4), dict(num_query_groups=1)
QK_NORM = dict(qk_layernorm=True)
QKV_BIAS = {**LLAMA, "add_qkv_bias": True}
LEARNED = dict(position_embedding_type="learned_absolute")
"""Beside the options of the configuration, an argument of GPTModel."""

AGAINST_RECURRENCE: dict[str, tuple[CrossLayerAttention, str | None, dict[str, Any]]] = {
    "pairs": (CLA2, None, {}),
    "uneven": (CLA3, None, {}),
    "one-group": (ONE_GROUP, None, {}),
    "ends-llama": (ENDS, None, LLAMA),
    "mha": (CLA2, None, MHA),
    "mqa-fewer-heads-than-ranks": (CLA3, None, {**MQA, **LLAMA}),
    "learned-positions": (CLA2, None, LEARNED),
    "qk-norm": (CLA2, None, QK_NORM),
    "qk-norm-llama": (ONE_GROUP, None, {**QK_NORM, **LLAMA}),
    "qkv-bias": (CLA2, None, QKV_BIAS),
    "sequence-parallel": (CLA3, None, SP),
    "bf16": (CLA2, None, BF16),
    "moe": (CLA2, None, {**MOE, **SP, "moe_token_dispatcher_type": "alltoall"}),
    "wide-heads": (CLA2, None, dict(kv_channels=12)),
    "separate": (SEPARATE, None, {}),
    "separate-llama-mqa": (SEPARATE_3, None, {**MQA, **LLAMA}),
    "separate-qk-norm": (SEPARATE, None, {**QK_NORM, **SP}),
    "separate-alone": (SEPARATE_ALONE, None, LLAMA),
    "ladder": (CLA2, "all", {}),
    "ladder-uneven-sequence-parallel": (CLA3, "last:3", {**LLAMA, **SP}),
    "ladder-separate": (SEPARATE, "1-2", LLAMA),
}


def full(method: str, layers: int) -> dict[str, Any]:
    return dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)


def selective(*modules: str) -> dict[str, Any]:
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


RECOMPUTE: dict[str, dict[str, Any]] = {
    "core-attention": selective("core_attn"),
    "norm": selective("layernorm"),
    "norm-mlp-core-attention": selective("layernorm", "mlp", "core_attn"),
    "uniform-1": full("uniform", 1),
    "uniform-2": full("uniform", 2),
    "uniform-3": full("uniform", 3),
    "block-1": full("block", 1),
    "block-3": full("block", 3),
    "distributed": {**full("uniform", 1), "distribute_saved_activations": True},
}

RECOMPUTED: dict[str, tuple[CrossLayerAttention, str | None, dict[str, Any]]] = {
    "uneven": (CLA3, None, LLAMA),
    "one-group-sequence-parallel": (ONE_GROUP, None, {**LLAMA, **SP}),
    "separate-mqa": (SEPARATE, None, {**LLAMA, **MQA}),
    "ladder": (CLA3, "all", LLAMA),
}
"""Each under every row of ``RECOMPUTE``, dropout on."""

STATIC_INFERENCE = ("uneven", "mqa-fewer-heads-than-ranks", "learned-positions", "ladder-separate")
DYNAMIC_INFERENCE = ("pairs", *STATIC_INFERENCE)
"""Rows of ``AGAINST_RECURRENCE`` that also decode."""
