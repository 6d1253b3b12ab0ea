"""The models that dense_moe_cases.py compares with the sums over experts written out."""

from __future__ import annotations

from typing import Any

import torch

from torch_plugins.config import DenseMoE

WORLD = 2
"""Tensor-parallel processes."""
LAYERS, HIDDEN, HEADS, VOCAB, BATCH, SEQUENCE = 3, 32, 4, 64, 2, 16
GPT = dict(
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    use_cpu_initialization=True,
    tensor_model_parallel_size=WORLD,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    gradient_accumulation_fusion=False,
    masked_softmax_fusion=False,
    bias_dropout_fusion=False,
    persist_layer_norm=False,
    apply_rope_fusion=False,
    normalization="RMSNorm",
    add_bias_linear=False,
    activation_func=torch.nn.functional.gelu,
)
SP = dict(sequence_parallel=True)
BF16 = dict(bf16=True, params_dtype=torch.bfloat16)
TOKEN_LOSS = dict(calculate_per_token_loss=True)
FULL = dict(recompute_granularity="full", recompute_method="uniform")
RECOMPUTE: dict[str, dict[str, Any]] = {
    "uniform 1": {**FULL, "recompute_num_layers": 1},
    "uniform 2": {**FULL, "recompute_num_layers": 2},
    "block 2": {**FULL, "recompute_method": "block", "recompute_num_layers": 2},
    "attention": dict(recompute_granularity="selective"),
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
}

WEIGHTS = dict(mi_weight_mlp=0.7, mi_weight_attention=0.4, router_hidden_size=24)
"""Large enough for the losses to show in every gradient."""
BOTH = dict(num_experts=4, attention_experts=2, **WEIGHTS)
GATED = dict(num_experts=4, gated=True, router="linear", **WEIGHTS)
LADDER, SHARING = dict(ladder="all"), dict(sharing=2)
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "both": (BOTH, {}),
    "sequence parallel": (BOTH, SP),
    "token loss": (BOTH, TOKEN_LOSS),
    "token loss, sequence parallel": (BOTH, {**TOKEN_LOSS, **SP}),
    "gated": (GATED, {}),
    "gated, sequence parallel": (GATED, SP),
    "heads": (dict(attention_experts=4, **WEIGHTS), {}),
    "heads shared by processes": (dict(attention_experts=4, router="linear", **WEIGHTS), SP),
    "four groups": (dict(num_experts=2, attention_experts=0, **WEIGHTS), {}),
    "ladder": (BOTH, LADDER),
    "ladder, sequence parallel": (GATED, {**LADDER, **SP}),
    "shared keys": (BOTH, SHARING),
    "shared keys, ladder": (BOTH, {**SHARING, **LADDER, **SP}),
    "no loss": ({**BOTH, "mi_weight_mlp": 0.0, "mi_weight_attention": 0.0}, {}),
}
"""Feature and options of a training step of two micro-batches."""

INFERENCE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (BOTH, {}),
    "top-k": ({**BOTH, "inference": "top-k", "top_k": 2}, {}),
    "threshold": ({**BOTH, "inference": "threshold", "threshold": 0.9}, {}),
    "top-k of gated": ({**GATED, "inference": "top-k", "top_k": 1}, LADDER),
    "heads": (
        {**BOTH, "attention_inference": "top-k", "attention_top_k": 1},
        {**SHARING, "add_qkv_bias": True},
    ),
    "heads of a kernel": (
        {**BOTH, "attention_inference": "top-k", "attention_top_k": 1},
        dict(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True),
    ),
    "heads shared by processes": (
        {
            **dict(attention_experts=4, router="linear", **WEIGHTS),
            **dict(attention_inference="top-k", attention_top_k=2),
        },
        {},
    ),
    "heads above": (
        {**BOTH, "inference": "threshold", "attention_inference": "threshold", "threshold": 0.9},
        {},
    ),
}


def feature_of(settings: dict[str, Any]) -> DenseMoE:
    return DenseMoE(**settings)


def groups_of(feature: DenseMoE) -> int:
    """Key-value heads."""
    return HEADS // feature.attention_experts if feature.attention_experts else 2
