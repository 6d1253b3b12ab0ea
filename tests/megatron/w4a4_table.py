"""The models that w4a4_cases.py compares with a naive one."""

from __future__ import annotations

from typing import Any

from tests.megatron.dense_moe_table import BF16, GPT, RECOMPUTE, SP, TOKEN_LOSS, WORLD

__all__ = ["BF16", "GPT", "RECOMPUTE", "SP", "STEPS", "TOKENS", "WORLD"]

LEARNED = dict(clip_init="2.5", kurtosis_weight=0.02)
"""A weight large enough for the kurtosis to show in every gradient."""
EXPERTS = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
    moe_ffn_hidden_size=24,
    expert_tensor_parallel_size=1,
    **SP,
)
BIASES = dict(add_bias_linear=True)
QUANTIZED = {**LEARNED, "weight_bits": 4}

STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learned": (LEARNED, {}),
    "sequence parallel": (LEARNED, SP),
    "token loss": (LEARNED, {**TOKEN_LOSS, **SP}),
    "biases": (LEARNED, BIASES),
    "biases, sequence parallel": (LEARNED, {**BIASES, **SP, "gated_linear_unit": False}),
    "symmetric": ({**LEARNED, "symmetric": True, "activation_bits": 3}, SP),
    "weights": (QUANTIZED, {}),
    "weights in groups": ({**QUANTIZED, "weight_group_size": 8}, SP),
    "mxfp4": ({**QUANTIZED, "grid": "mxfp4"}, dict(hidden_size=64)),
    "nvfp4": ({**LEARNED, "grid": "nvfp4"}, {}),
    "nvfp4, sequence parallel": ({**LEARNED, "grid": "nvfp4"}, SP),
    "no kurtosis": ({**LEARNED, "kurtosis_weight": 0.0}, {}),
    "kurtosis alone": ({**LEARNED, "activation_bits": 0}, SP),
    "some layers": ({**LEARNED, "modules": "*.[02].*,!*.linear_fc1"}, {}),
    "shared keys": (LEARNED, dict(sharing=2)),
    "ladder": ({**LEARNED, "kurtosis_weight": 0.0}, dict(ladder="all", **SP)),
    "experts": (LEARNED, EXPERTS),
    "experts over processes": (LEARNED, {**EXPERTS, "expert_model_parallel_size": 2}),
}
"""Feature and options of a training step of two micro-batches."""

TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all": (dict(granularity="token"), {}),
    "sequence parallel": (dict(granularity="token", activation_bits=5), SP),
    "experts": (dict(granularity="token"), EXPERTS),
}
"""Scales of each token."""
