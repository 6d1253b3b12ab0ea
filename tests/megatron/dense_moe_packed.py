"""Experts in four bits on Megatron's layers, for dense_moe_cases.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_plugins.dense_moe_int4 import pack_experts
from torch_plugins.weight_quant import round_to_nearest


def packed(model: Any, *inputs: Tensor) -> list[float]:
    """Experts in four bits: how far from the rounded weights these and the weights are."""
    with torch.no_grad():
        plain, layers = model(*inputs), pack_experts(model)
        found = model(*inputs)
        for layer in (mlp for mlp in model.modules() if hasattr(mlp, "expert_weights")):
            layer.packed, layers = None, layers - 1
            _, down, experts, _ = layer.expert_weights()
            rows = layer.linear_fc1.weight
            rows.copy_(round_to_nearest(rows).dequantize())
            parts = [round_to_nearest(part).dequantize() for part in down.chunk(experts, 1)]
            down.copy_(torch.cat(parts, 1))
        assert layers == 0
        expected = model(*inputs)
    return [distance(found, expected), distance(plain, expected)]


def distance(A: Tensor, B: Tensor) -> float:
    return ((A - B).abs().max() / B.abs().max()).item()
