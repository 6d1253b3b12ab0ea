"""Desync Residual in one process: what each of T tensor-parallel ranks would compute.

A matrix has the rows or columns of rank 0 first, then those of rank 1, and so on, as a
tensor-parallel run divides it: each rank has whole heads of its own, with their keys and values.
Within a pattern's regions every rank has its own residual stream, and its own norm weights, which
lie one rank after another in one vector, as optimizers expect of a norm.

Shapes: T ranks, B batch, S tokens, D hidden size, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_plugin_decoder import PluginDecoderConfig
from .norm import PluginDecoderRMSNorm

ROWS = ("o_proj", "down_proj")
"""Row-parallel projections, which lead back to the stream; the others are column-parallel."""


class PluginDecoderRankRMSNorm(PluginDecoderRMSNorm):
    """RMSNorm with weights ``[T D]`` of the ranks: ``[T, B, S, D]``, or one stream for all of
    them, ``[B, S, D]``, to ``[T, B, S, D]``."""

    def __init__(self, hidden_size: int, eps: float, ranks: int) -> None:
        super().__init__(ranks * hidden_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        return _of_ranks(self.weight, x) * self.normalize(x)


class PluginDecoderRankLayerNorm(nn.Module):
    """The same of LayerNorm."""

    def __init__(self, hidden_size: int, eps: float, bias: bool, ranks: int) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(ranks * hidden_size))
        self.bias = nn.Parameter(torch.zeros(ranks * hidden_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        out = _of_ranks(self.weight, x) * out
        return out if self.bias is None else out + _of_ranks(self.bias, x)


def _of_ranks(vector: Tensor, x: Tensor) -> Tensor:
    """``[T D]`` as ``[T, 1, 1, D]``, D the width of ``x``."""
    return vector.view(-1, 1, 1, x.shape[-1])


RankNorm = PluginDecoderRankRMSNorm | PluginDecoderRankLayerNorm


def build_rank_norm(config: PluginDecoderConfig, ranks: int) -> RankNorm:
    """The configured norm over the hidden size, with weights of each rank."""
    if config.normalization == "rmsnorm":
        return PluginDecoderRankRMSNorm(config.hidden_size, config.norm_eps, ranks)
    return PluginDecoderRankLayerNorm(config.hidden_size, config.norm_eps, config.norm_bias, ranks)


class PluginDecoderRankColumn(nn.Linear):
    """Every rank's rows of the matrix on its own input: ``[T, B, S, I] -> [B, S, O]``."""

    ranks: int

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (self.ranks, -1))
        out = torch.einsum("tbsi,toi->bsto", x, weight).flatten(-2)
        return out if self.bias is None else out + self.bias


class PluginDecoderRankRow(nn.Linear):
    """Every rank's partial sums, of its columns of the matrix: ``[B, S, I] -> [T, B, S, O]``."""

    ranks: int

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (self.ranks, -1))
        return torch.einsum("bsti,oti->tbso", x.unflatten(-1, (self.ranks, -1)), weight)


def divide(module: nn.Module, ranks: int) -> None:
    """Have the projections of an attention or MLP compute what the ranks would."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            linear: Any = child
            linear.__class__ = PluginDecoderRankRow if name in ROWS else PluginDecoderRankColumn
            linear.ranks = ranks
