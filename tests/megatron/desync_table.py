"""The models that desync_cases.py compares with the naive reference: patterns and options."""

from __future__ import annotations

from typing import Any

from tests.megatron.ladder_table import FULL, GPT, LLAMA, RECOMPUTED_NORM, SP

LAYERS = 4
OPTIONS = {**GPT, "add_bias_linear": False}

CASES: dict[str, tuple[Any, ...]] = {
    "2x": ("2x", {}),
    "3x": ("3x", {}),
    "4x": ("4x", {}),
    "last": ("last", {}),
    "attention-reduces": ("10", {}),
    "listed": ("11,00,10,01", {}),
    "llama": ("4x", LLAMA),
    "llama-2x": ("2x", {**LLAMA, "qk_layernorm": True}),
    "multiplied": ("4x", LLAMA, 0.22),
    "sequence-parallel": ("4x", {**LLAMA, **SP}),
    "sequence-parallel-listed": ("11,00,10,01", {**SP, "qk_layernorm": True}),
    "sequence-parallel-recompute": ("3x", {**LLAMA, **SP, **FULL}),
    "recompute": ("3x", FULL),
    "recompute-norm": ("4x", {**LLAMA, **RECOMPUTED_NORM}),
}
FOUR = ("4x", "llama-2x", "sequence-parallel-listed")
"""Of these, what four processes compute too."""
