"""Attention of DS-MoE that computes the chosen pairs of token and expert only.

Experts share keys and values, so a query head of an expert that a token does not keep can be left
out: its projection, its attention and its part of the output projection. For each expert its tokens
are gathered from every sequence of the batch, padded to the largest count in one; the padding is
other tokens of the sequence, and what comes out for them is dropped. Work per expert is a few
operations on tensors, whatever the number of tokens. Scores multiply outputs as in
:func:`torch_plugins.dense_moe.gate_heads`, with those of dropped experts 0.

Shapes: B batch, S query tokens, T key tokens, L tokens of one expert, D hidden size, A experts, J
heads of keys and values and of each expert, P head dimension. Head ``j A + i`` is expert i's.

Paper: arXiv 2404.05567, equations 7 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Chosen(NamedTuple):
    """The tokens of one expert."""

    expert: int
    tokens_BL: Tensor
    """Positions in the sequence, each once."""
    gates_BL: Tensor
    """Scores, 0 for padding."""

    def rows(self, x: Tensor) -> Tensor:
        """Of ``x`` ``[B or 1, S, ...]`` those of the tokens, ``[B, L, ...]``."""
        return x.expand(len(self.tokens_BL), *x.shape[1:]).take_along_dim(self._index(x.dim()), 1)

    def add_to(self, total: Tensor, rows: Tensor) -> None:
        """Add ``rows`` ``[B, L, ...]``, 0 for padding, to those of ``total`` ``[B, S, ...]``."""
        total.scatter_add_(1, self._index(rows.dim()).expand_as(rows), rows)

    def _index(self, dimensions: int) -> Tensor:
        return self.tokens_BL.reshape(*self.tokens_BL.shape, *[1] * (dimensions - 2))


def chosen(scores_BSA: Tensor, kept_BSA: Tensor) -> Iterator[Chosen]:
    """The tokens of every expert that has any.

    Args:
        kept_BSA: bool; see :func:`torch_plugins.dense_moe.keep`.
    """
    masked = scores_BSA * kept_BSA
    order = kept_BSA.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    for expert, count in enumerate(kept_BSA.sum(1).amax(0).tolist()):
        if count:
            tokens = order[:, :count, expert]
            yield Chosen(expert, tokens, masked[..., expert].take_along_dim(tokens, 1))


def attend(
    query_BJLP: Tensor,
    key_BJTP: Tensor,
    value_BJTP: Tensor,
    tokens_BL: Tensor,
    length: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of some tokens of sequences, ``[B, J, L, P]``.

    Args:
        length: S; the last query token sees all T keys.
        mask: ``[B or 1, 1, S, T]``, bool (true: visible) or added to the products; None: a token
            sees itself and those before it.
        scale: of the products, by default ``P ** -0.5``.
    """
    keys = key_BJTP.shape[2]
    if mask is not None:
        rows = mask.expand(len(tokens_BL), 1, length, keys)
        mask = rows.take_along_dim(tokens_BL[:, None, :, None], 2)
    elif length > 1:
        last = tokens_BL + (keys - length)
        mask = (torch.arange(keys, device=last.device) <= last.unsqueeze(-1)).unsqueeze(1)
    return F.scaled_dot_product_attention(query_BJLP, key_BJTP, value_BJTP, mask, scale=scale)


def sparse_attention(
    query: Callable[[Chosen], Tensor],
    output: Callable[[int, Tensor], Tensor],
    key_BJTP: Tensor,
    value_BJTP: Tensor,
    scores_BSA: Tensor,
    kept_BSA: Tensor,
    width: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The kept experts with their projections, ``[B, S, D]``; zeros where a token keeps none.

    Args:
        query: the queries of an expert for its tokens, ``[B, J, L, P]``, normalized and rotated.
        output: the output projection of an expert, ``(expert, [B, L, J P]) -> [B, L, D]``.
        width: D.
        kept_BSA, mask, scale: see :func:`chosen` and :func:`attend`.
    """
    total = key_BJTP.new_zeros(*scores_BSA.shape[:2], width)
    length = scores_BSA.shape[1]
    for group in chosen(scores_BSA, kept_BSA):
        tokens = group.tokens_BL
        heads = attend(query(group), key_BJTP, value_BJTP, tokens, length, mask, scale)
        gated = heads.transpose(1, 2) * group.gates_BL[..., None, None]
        group.add_to(total, output(group.expert, gated.flatten(-2)))
    return total


def sparse_heads(
    query_BSHP: Tensor,
    key_BJTP: Tensor,
    value_BJTP: Tensor,
    kept_BSA: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The heads of the kept experts where all queries are projected already, ``[B, S, H, P]``: not
    multiplied by scores, and zeros for the experts that a token does not keep."""
    heads, experts = query_BSHP.shape[2], kept_BSA.shape[-1]
    query = query_BSHP.unflatten(2, (heads // experts, experts))
    total = torch.zeros_like(query)
    for group in chosen(kept_BSA.to(query.dtype), kept_BSA):
        own = group.rows(query[:, :, :, group.expert]).transpose(1, 2)
        tokens, length = group.tokens_BL, query.shape[1]
        out = attend(own, key_BJTP, value_BJTP, tokens, length, mask, scale).transpose(1, 2)
        group.add_to(total[:, :, :, group.expert], out * group.gates_BL[..., None, None])
    return total.flatten(2, 3)
