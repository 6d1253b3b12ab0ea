"""Models that are served, each with configurations that must be told from it.

A *control* changes fields of the configuration and keeps the weights: the engine must be far from
it, else the bound that it meets with the right configuration would prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-4
"""Of prompt log-probabilities in fp32."""

VOCAB = 97
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Heads of 32 features, the smallest that vLLM's CPU attention has."""

ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = ROPE | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
LADDER = {"ladder_residual": {"layers": "all"}}
EXPERTS = {
    "dense_moe": {
        "num_experts": 6,
        "gated": True,
        "router": "linear",
        "inference": "top-k",
        "top_k": 2,
    }
}
CHOICES = ({"num_experts_per_tok": 3}, {"norm_topk_prob": True})
CLA2 = {"cross_layer_attention": {"sharing_factor": 2}}


@dataclass(frozen=True)
class Family:
    """A decoder, and how vLLM is started on it."""

    fields: dict[str, Any] = field(default_factory=dict)
    controls: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``vllm.LLM``."""
    stock: str = ""
    """``Qwen2Moe``: the exporters write it as that model of transformers, which vLLM has too."""

    @property
    def config(self) -> dict[str, Any]:
        return TINY | self.fields


def cla(pattern: str, kv_norm: str = "shared") -> dict[str, Any]:
    return {"cross_layer_attention": {"pattern": pattern, "kv_norm": kv_norm}}


FAMILIES = {
    "llama": Family(
        controls=({"norm_eps": 1e-2}, {"rope_parameters": ROPE}, {"hidden_act": "gelu"}),
    ),
    "granite": Family(
        GRANITE | {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        (
            *({name: value * 1.01} for name, value in GRANITE.items()),
            {"rope_parameters": LLAMA3 | {"factor": 5.0}},
        ),
    ),
    "gpt": Family(
        {
            "normalization": "layernorm",
            "mlp_gated": False,
            "hidden_act": "gelu",
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 4,
            "position_embedding_type": "learned_absolute",
            "embedding_multiplier": 2.0,
            "tie_word_embeddings": True,
        },
        (
            {"hidden_act": "relu"},
            {"position_embedding_type": "none"},
            {"attention_output_bias": False},
            {"attention_bias": False, "attention_output_bias": True},
            {"mlp_bias": False},
            {"norm_bias": False},
            {"embedding_multiplier": 2.02},
        ),
    ),
    "qk-norm": Family(
        {
            "qk_norm": True,
            "attention_bias": True,
            "attention_output_bias": False,
            "num_key_value_heads": 1,
            "hidden_act": "gelu",
            "rope_parameters": ROPE | {"rope_type": "linear", "factor": 2},
        },
        ({"qk_norm": False}, {"rope_parameters": ROPE}, {"hidden_act": "gelu_pytorch_tanh"}),
    ),
    "partial-rotary": Family(
        {
            "head_dim": 64,
            "rope_parameters": YARN,
            "normalization": "layernorm",
            "norm_bias": False,
            "mlp_gated": False,
            "hidden_act": "relu2",
        },
        (
            {"rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
            {"rope_parameters": YARN | {"factor": 5.0}},
            {"hidden_act": "relu"},
        ),
    ),
    "ladder": Family(LADDER, ({"ladder_residual": None}, {"ladder_residual": {"layers": "1-3"}})),
    "partial-ladder": Family(
        GRANITE | {"ladder_residual": {"layers": "1-2"}},
        ({"ladder_residual": {"layers": "2"}}, {"residual_multiplier": 0.404}),
        {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}},
    ),
    "cla2": Family(CLA2, (cla("0,0,0,0"), LADDER), {"enforce_eager": False}),
    "cla3-ladder": Family(
        LADDER
        | {
            "num_hidden_layers": 7,
            "cross_layer_attention": {"sharing_factor": 3, "kv_norm": "separate"},
            "attention_bias": True,
            "qk_norm": True,
        },
        (
            {"ladder_residual": None},
            {"cross_layer_attention": {"sharing_factor": 3}},
            cla("0,1,1,1,1,1,1", "separate"),
        ),
    ),
    "keep-ends": Family(
        {
            "num_key_value_heads": 1,
            "normalization": "layernorm",
            "position_embedding_type": "none",
            "cross_layer_attention": {"pattern": "keep-ends", "kv_norm": "separate"},
        },
        (cla("keep-ends"), cla("0,1,1,1", "separate")),
    ),
    "experts": Family(
        EXPERTS | {"attention_bias": True, "attention_output_bias": False},
        CHOICES,
        stock="Qwen2Moe",
    ),
    "experts-qk-norm": Family(EXPERTS | {"qk_norm": True}, CHOICES, stock="Qwen3Moe"),
    "tensor-parallel": Family(
        LADDER
        | {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "cross_layer_attention": {"sharing_factor": 2, "kv_norm": "separate"},
        },
        ({"ladder_residual": None}, CLA2),
        {"tensor_parallel_size": 2},
    ),
    "pipeline": Family(
        LADDER
        | CLA2
        | {"tie_word_embeddings": True, "position_embedding_type": "learned_absolute"},
        ({"ladder_residual": {"layers": "0-1"}}, cla("0,0,0,0")),
        # vLLM's eager mode on CPU skips the warm-up that makes a later stage's buffers.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ),
}
