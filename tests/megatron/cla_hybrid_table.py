"""The models of cla_hybrid_cases.py: a feature, ladder layers or None, options of both models."""

from __future__ import annotations

from typing import Any

from tests.megatron.cla_table import (
    CLA2,
    CLA3,
    ENDS,
    MQA,
    ONE_GROUP,
    SEPARATE,
    SEPARATE_3,
    full,
    selective,
)
from tests.megatron.hybrid_table import EXPERTS
from tests.megatron.ladder_table import BF16, LLAMA, SP
from torch_plugins.config import CrossLayerAttention

AGAINST_GPT: dict[str, tuple[CrossLayerAttention, str | None, str | None, dict[str, Any]]] = {
    "pairs": (CLA2, None, None, {}),
    "uneven": (CLA3, None, None, {}),
    "ends-llama": (ENDS, None, None, LLAMA),
    "sequence-parallel": (CLA2, None, None, SP),
    "separate-mqa": (SEPARATE_3, None, None, {**LLAMA, **MQA}),
    "bf16": (CLA2, None, None, BF16),
    "moe": (CLA2, None, None, EXPERTS),
    "recompute": (ONE_GROUP, None, None, full("uniform", 1)),
    "recompute-separate": (SEPARATE, None, None, {**LLAMA, **full("uniform", 3)}),
    "ladder": (CLA2, "all", "all", {}),
    "ladder-uneven-sequence-parallel": (CLA3, "last:3", "last:6", {**LLAMA, **SP}),
    "ladder-separate-recompute": (SEPARATE, "1-2", "2-5", {**LLAMA, **full("uniform", 1)}),
}
"""Ladder layers of a GPT, of the stack of the same modules, and options of both."""

BETWEEN: dict[str, tuple[CrossLayerAttention, str, dict[str, Any]]] = {
    "mamba": (CLA2, "M*M*-*MM*M", {}),
    "neighbours": (CLA3, "**-M*-*", LLAMA),
    "list": (CrossLayerAttention(pattern="0,1,1"), "*-M*-M-*M", {}),
    "separate": (SEPARATE, "M*-M-*M", LLAMA),
    "one-attention": (CrossLayerAttention(1, kv_norm="separate"), "MM*-", {}),
}
"""A feature, a pattern and options: layers of other kinds between the layers of a group."""

MIXED = "M*M-*M*-*M-"
RECOMPUTE: dict[str, dict[str, Any]] = {
    "core-attention": selective("core_attn"),
    **{f"uniform-{n}": full("uniform", n) for n in (1, 2, 3, 5, 11)},
    **{f"block-{n}": full("block", n) for n in (1, 2, 3, 4, 8)},
}
"""Of ``MIXED``: chunks end behind producers, before and behind Mamba layers, and in between."""

INFERENCE: dict[str, tuple[CrossLayerAttention, str | None, dict[str, Any]]] = {
    "uneven": (CLA3, None, {}),
    "ladder-separate": (SEPARATE, "2-5", LLAMA),
    "mixed": (CLA2, None, dict(pattern=MIXED)),
}
