"""A layer of gated experts (SwiGLU), of which every token keeps k: ours and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from arms import Tell, may_fail, native
from names import EAGER_EXPERTS, GROUPED, MOE_BF16, MOE_INT4
from torch import Tensor
from weights import to_int4

Shape = Sequence[int]
"""Hidden size, width of an expert, experts, experts kept."""


class Draw(NamedTuple):
    """Tokens and the experts that a router chose for them, in ours and in transformers' form."""

    x: Tensor
    """``[T, D]``"""
    scores: Tensor
    """``[T, N]``"""
    kept: Tensor
    """bool ``[T, N]``"""
    weights: Tensor
    """``[T, k]``"""
    chosen: Tensor
    """``[T, k]``"""


Forward = Callable[[Draw], Tensor]


@dataclass(frozen=True)
class Experts:
    """``gate`` and ``up`` ``[N, F, D]``, ``down`` ``[N, D, F]`` in bf16."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def draw(cls, shape: Shape) -> Experts:
        hidden, width, count, _ = shape
        torch.manual_seed(0)
        gate, up = (torch.randn(count, width, hidden).mul(hidden**-0.5).bfloat16() for _ in "gu")
        return cls(gate, up, torch.randn(count, hidden, width).mul(width**-0.5).bfloat16())


def ours(experts: Experts, tell: Tell) -> dict[str, Forward]:
    """The native operators that are there; int4 weights with one scale for each row."""
    forwards: dict[str, Forward] = {}
    with may_fail(MOE_BF16, tell, True):
        (sparse_moe,) = native("sparse_moe.sparse_moe")
        weights = experts.gate, experts.up, experts.down
        forwards[MOE_BF16] = lambda of: sparse_moe(of.x, of.scores, of.kept, *weights)
    with may_fail(MOE_INT4, tell, True):
        pack, prepack, moe = native(
            "int4.pack_int4", "sparse_moe.prepack_experts", "sparse_moe.w4a4_sparse_moe_prepacked"
        )
        (gate_up, gate_up_scale), (down, down_scale) = quantized(experts)
        _, width, hidden = experts.gate.shape
        first = prepack(pack(gate_up), gate_up_scale, hidden)
        second = prepack(pack(down), down_scale, width)
        forwards[MOE_INT4] = lambda of: moe(of.x, of.scores, of.kept, first, second, width)
    return forwards


def quantized(experts: Experts) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes and scales of gate and up, one above the other, and of down."""
    gate_up = torch.cat((experts.gate, experts.up), 1).float()
    down = experts.down.float()
    return to_int4(gate_up, gate_up.shape[-1]), to_int4(down, down.shape[-1])


def theirs(experts: Experts, shape: Shape) -> dict[str, Forward]:
    """Mixtral's experts of transformers, by the loop over experts and by ``grouped_mm``."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.utils import logging

    logging.set_verbosity_error()  # experts outside a model choose no implementation
    hidden, width, count, _ = shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=count)
    module = MixtralExperts(config).bfloat16()
    with torch.no_grad():
        module.gate_up_proj.copy_(torch.cat((experts.gate, experts.up), 1))
        module.down_proj.copy_(experts.down)

    def by(implementation: str) -> Forward:
        def forward(of: Draw) -> Tensor:
            config._experts_implementation = implementation
            out: Tensor = module(of.x, of.chosen, of.weights)
            return out

        return forward

    return {EAGER_EXPERTS: by("eager"), GROUPED: by("grouped_mm")}


def reference(experts: Experts, of: Draw) -> Tensor:
    from torch_plugins.ops.int4 import pack_int4
    from torch_plugins.ops.sparse_moe import w4a4_sparse_moe_reference

    weights = [value for codes, scale in quantized(experts) for value in (pack_int4(codes), scale)]
    return w4a4_sparse_moe_reference(*of[:3], *weights, True, "silu", 4)
