"""The models whose residual multiplier power_mup_cases.py checks: ladder layers and options."""

from __future__ import annotations

from typing import Any

from tests.megatron.ladder_table import BF16, FULL, LLAMA, MOE, SP

MULTIPLIER = 0.22

AGAINST_RECURRENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("none", {}),
    "llama": ("none", LLAMA),
    "fused": ("none", dict(bias_dropout_fusion=True)),
    "sequence-parallel": ("none", SP),
    "bf16": ("none", BF16),
    "fp32-residual": ("none", {**BF16, "fp32_residual_connection": True}),
    "fp32-residual-llama": ("none", {**BF16, **LLAMA, "fp32_residual_connection": True}),
    "recompute-full": ("none", FULL),
    "recompute-block": ("none", {**LLAMA, **FULL, "recompute_method": "block"}),
    "recompute-core-attention": ("none", dict(recompute_granularity="selective")),
    "recompute-norm-mlp": (
        "none",
        {**LLAMA, "recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
    ),
    "moe": ("none", {**MOE, **SP, "moe_token_dispatcher_type": "alltoall"}),
    "ladder": ("all", {}),
    "ladder-llama-partial": ("1-2", LLAMA),
    "ladder-recompute": ("last:3", {**FULL, **SP, "recompute_num_layers": 2}),
    "ladder-moe": ("all", {**MOE, **SP, "moe_token_dispatcher_type": "alltoall"}),
}
