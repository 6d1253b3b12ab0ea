"""The kurtosis of what Megatron's linear layers put out, projection by projection.

Megatron computes several projections of a Hugging Face model in one linear: queries, keys and
values, or gate and up. Each has a kurtosis of its own here, over its own features, as in a model
that keeps them apart.

Shapes: S sequence, B batch, T tensor-parallel size, d features of one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugins import auxiliary_loss
from megatron_plugins.metrics import Meter
from torch_plugins.auxiliary_loss import AuxiliaryLoss
from torch_plugins.config import W4A4
from torch_plugins.ops.kurtosis import kurtosis, kurtosis_of_parts

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
METER = Meter(PROJECTIONS, ("kurtosis",))

Split = Callable[[Tensor], Sequence[Tensor]]
"""The projections in a linear's output."""


def whole(y: Tensor) -> Sequence[Tensor]:
    return (y,)


def halves(y: Tensor) -> Sequence[Tensor]:
    """Gate and up."""
    return y.chunk(2, -1)


def heads(queries: int, head: int) -> Split:
    """Of each key-value group its ``queries`` heads of queries, then one of keys, one of values; no
    queries where a linear makes keys and values only."""

    def split(y: Tensor) -> Sequence[Tensor]:
        by_head = y.unflatten(-1, (-1, queries + 2, head))
        parts = by_head.split([queries, 1, 1] if queries else [1, 1], -2)
        return [part.flatten(-3) for part in parts]

    return split


class Micro:
    """The micro-batch that a layer runs, for its experts: they see only the tokens that chose
    them."""

    tokens = 0
    """Of all tensor-parallel processes."""


class Penalty:
    """Adds ``kurtosis_weight`` times the mean kurtosis of a linear's projections to the objective.

    Args:
        names: of the projections, of :data:`PROJECTIONS`.
        column: whether the processes of tensor parallelism have parts of the features; else they
            have all, of the same tokens or of their own.
        group: of tensor parallelism.
        experts_per_token: of a token, where the linear is an expert's: the mean is over pairs of
            token and expert then.
    """

    def __init__(
        self,
        feature: W4A4,
        config: Any,
        names: Sequence[str],
        split: Split,
        column: bool,
        group: Any,
        micro: Micro,
        experts_per_token: int | None,
    ) -> None:
        self.config, self.names, self.split, self.group = config, names, split, group
        self.column, self.micro, self.experts_per_token = column, micro, experts_per_token
        self.terms = [AuxiliaryLoss(f"kurtosis_{n}", feature.kurtosis_weight) for n in names]

    def __call__(self, output: Tensor, bias: Tensor | None) -> Tensor:
        """``output``, with the loss attached; ``bias`` is one that is yet to be added to it."""
        if not torch.is_grad_enabled() or not output.requires_grad:
            return output
        parts = self.split(output if bias is None else output + bias)
        if self.column and self.group.size() > 1:
            values = kurtosis_of_parts(parts, self._gather).unbind()
        else:
            values = tuple(kurtosis(part) for part in parts)
        tokens, pairs, share = self._counts(values[0].numel())
        copies = 1 if self._own_tokens() else self.group.size()
        for name, value, term in zip(self.names, values, self.terms, strict=True):
            total = value.sum()
            METER.add(name, [total.detach() / copies], value.numel() / copies)
            output = auxiliary_loss.attach(output, total / pairs, term, self.config, tokens, share)
        return output

    def _own_tokens(self) -> bool:
        """Whether each process has tokens of its own, and not all of them."""
        parallel = self.config.sequence_parallel and self.group.size() > 1
        return self.experts_per_token is not None or (parallel and not self.column)

    def _counts(self, here: int) -> tuple[int, int, float]:
        """Tokens of the micro-batch, what the sum is divided by, and this process's share."""
        if self.experts_per_token is not None:
            tokens = self.micro.tokens
            return tokens, tokens * self.experts_per_token, 1.0
        if self._own_tokens():
            return here * self.group.size(), here, 1 / self.group.size()
        return here, here, 1.0

    def _gather(self, own: Tensor) -> Tensor:
        everywhere = own.new_empty(self.group.size(), *own.shape)
        dist.all_gather(list(everywhere.unbind()), own.contiguous(), group=self.group)
        return everywhere
