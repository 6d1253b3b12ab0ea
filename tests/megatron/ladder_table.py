"""The models that ladder_cases.py compares with the recurrence: ladder layers and options."""

from __future__ import annotations

from typing import Any

import torch

WORLD = 2
"""Tensor-parallel processes."""
LAYERS, HIDDEN, VOCAB, BATCH, SEQUENCE = 4, 32, 64, 2, 16
GPT = dict(
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    use_cpu_initialization=True,
    tensor_model_parallel_size=WORLD,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    gradient_accumulation_fusion=False,
    masked_softmax_fusion=False,
    bias_dropout_fusion=False,
    persist_layer_norm=False,
    apply_rope_fusion=False,
)
LLAMA = dict(
    normalization="RMSNorm",
    add_bias_linear=False,
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
)
MOE = dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, add_bias_linear=False)
SP = dict(sequence_parallel=True)
BF16 = dict(bf16=True, params_dtype=torch.bfloat16)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
RECOMPUTED_NORM = dict(recompute_granularity="selective", recompute_modules=["layernorm"])

AGAINST_RECURRENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all", {}),
    "last": ("last:2", {}),
    "first": ("0-1", {}),
    "middle": ("1-2", {}),
    "alternating": ("0,2", {}),
    "only-last": ("3", {}),
    "llama": ("all", LLAMA),
    "llama-partial": ("last:3", LLAMA),
    "sequence-parallel": ("all", SP),
    "sequence-parallel-partial": ("1,3", SP),
    "bf16": ("all", BF16),
    "fp32-residual": ("all", {**BF16, "fp32_residual_connection": True}),
    "fp32-residual-sequence-parallel": (
        "all",
        {**BF16, **SP, "fp32_residual_connection": True},
    ),
    "fp32-residual-partial": ("1-2", {**BF16, "fp32_residual_connection": True}),
    "recompute-uniform-1": ("all", FULL),
    "recompute-uniform-2": ("last:3", {**FULL, "recompute_num_layers": 2}),
    "recompute-block-2": ("all", {**FULL, "recompute_method": "block", "recompute_num_layers": 2}),
    "recompute-sequence-parallel": ("1-3", {**FULL, **SP}),
    "recompute-distributed": ("all", {**FULL, "distribute_saved_activations": True}),
    "recompute-core-attention": ("all", dict(recompute_granularity="selective")),
    "recompute-norm": ("last:3", RECOMPUTED_NORM),
    # Without biases: Megatron 0.19.2 recomputing an MLP that returns one recurses for ever.
    "recompute-norm-mlp": (
        "all",
        {**LLAMA, "recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
    ),
    "recompute-norm-sequence-parallel": ("all", {**SP, **RECOMPUTED_NORM}),
    "recompute-mlp-sequence-parallel": (
        "all",
        {**LLAMA, **SP, "recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ),
    "mlp-chunks": ("all", dict(mlp_chunks_for_training=2)),
    "moe": ("all", {**MOE, **SP, "moe_token_dispatcher_type": "alltoall"}),
    "moe-allgather-partial": ("last:2", {**MOE, **SP, "moe_token_dispatcher_type": "allgather"}),
    "moe-and-dense": ("all", {**MOE, **SP, "moe_layer_freq": [0, 1, 0, 1]}),
}
