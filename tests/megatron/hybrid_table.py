"""The models that hybrid_cases.py compares: patterns of layers, ladder layers and options."""

from __future__ import annotations

from typing import Any

from tests.megatron.ladder_table import BF16, FULL, LLAMA, MOE, RECOMPUTED_NORM, SP

PATTERN = "*-*-*-*-"
EXPERTS = {**MOE, **SP, "moe_token_dispatcher_type": "alltoall"}
TP1 = dict(tensor_model_parallel_size=1)

AGAINST_RECURRENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all", {}),
    "odd": ("3-6", {}),
    "alternating": ("1,3,5,7", {}),
    "only-last": ("7", {}),
    "llama": ("last:5", LLAMA),
    "uneven": ("all", dict(pattern="**--*-")),
    "attention": ("1-2", dict(pattern="***")),
    "mlps": ("all", dict(pattern="-----")),
    "sequence-parallel": ("all", SP),
    "sequence-parallel-uneven": ("1,3-5", {**SP, "pattern": "**--*-"}),
    "fp32-residual": ("2-5", {**BF16, "fp32_residual_connection": True}),
    "recompute-uniform-1": ("all", FULL),
    "recompute-uniform-3": ("2-6", {**FULL, "recompute_num_layers": 3}),
    "recompute-block-3": ("all", {**FULL, "recompute_method": "block", "recompute_num_layers": 3}),
    "recompute-sequence-parallel": ("2-6", {**FULL, **SP}),
    "recompute-norm-sequence-parallel": ("all", {**SP, **RECOMPUTED_NORM}),
    "recompute-mlp-sequence-parallel": (
        "all",
        {**LLAMA, **SP, "recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ),
    "moe": ("1-6", {**EXPERTS, "pattern": "*E-*E*-E"}),
    "other-mixers": ("2-6", dict(pattern="M*-*-*-M")),
    "other-mixers-recompute": ("2,6", {**FULL, "recompute_num_layers": 2, "pattern": "M*-M-*-M"}),
}
"""Ladder layers of the stack."""

AGAINST_GPT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tp1": ("all", "all", TP1),
    "tp1-partial": ("1-2", "2-5", TP1),
    "tp1-recompute": ("1-2", "2-5", {**TP1, **FULL}),
    "tp2": ("all", "all", {}),
    "tp2-partial": ("1,3", "2-3,6-7", {}),
    "tp2-recompute": ("all", "all", FULL),
    "sequence-parallel": ("all", "all", SP),
    "sequence-parallel-partial": ("last:2", "last:4", {**LLAMA, **SP}),
    "sequence-parallel-recompute": ("last:2", "last:4", {**FULL, **SP}),
    "moe": ("all", "all", EXPERTS),
}
"""Ladder layers of a GPT, of the stack of the same modules, and options of both."""
