"""Mixture of attention heads: A experts of J query heads share J heads of keys and values.

Query heads lie as grouped-query attention wants them, key-value head first: head ``h`` is one of
expert ``h mod A`` and attends to key-value head ``h // A``. So a tensor-parallel process has heads
of all experts, or of some where it shares its key-value head with others. Scores multiply what goes
into ``linear_proj``, head by head.

Shapes: S sequence, B batch, H query heads of this process, P head dimension, A experts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_plugins.dense_moe.router import Router
from torch_plugins.config import DenseMoE


@cache
def heads_class(base: type) -> type:
    """A subclass of ``SelfAttention`` whose query heads belong to experts."""

    attention_class: Any = base

    class ExpertAttention(attention_class):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            feature: DenseMoE = config.megatron_plugins[DenseMoE.key()]
            group = self.pg_collection.tp
            self.router = Router(config, feature, "attention", group)
            heads = config.num_attention_heads // group.size()
            first = group.rank() * heads
            self.expert_of_head = [(first + h) % self.router.experts for h in range(heads)]
            self._scores: Tensor | None = None
            self.linear_proj.register_forward_pre_hook(self._weigh)

        def _weigh(self, linear: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            """Multiply each head's output, ``[S, B, H P]``, by its expert's score."""
            heads, scores = args[0], self._scores
            assert scores is not None
            index = torch.tensor(self.expert_of_head, device=scores.device)
            own = scores.index_select(-1, index).unsqueeze(-1)
            return ((heads.unflatten(-1, (own.shape[-2], -1)) * own).flatten(-2), *args[1:])

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            scores = self.router(hidden_states)
            kept = self.router.keep(scores)
            self._scores = scores if kept is None else scores * kept
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                self._scores = None

    ExpertAttention.__name__ = ExpertAttention.__qualname__ = f"Expert{base.__name__}"
    return ExpertAttention
