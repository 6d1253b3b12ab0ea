"""Mixture of attention heads: A experts of J query heads share J heads of keys and values.

Query heads lie as grouped-query attention wants them, key-value head first: head ``h`` is one of
expert ``h mod A`` and attends to key-value head ``h // A``. So a tensor-parallel process has heads
of all experts, or of some where it shares its key-value head with others. Scores multiply what goes
into ``linear_proj``, head by head. Inference that keeps few experts leaves the others out of
Megatron's own linears and ``DotProductAttention``; TransformerEngine's and other kernels compute
them, for scores of 0.

Shapes: S sequence, B batch, H query heads of this process, P head dimension, A experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_plugins.dense_moe import projections
from megatron_plugins.dense_moe.router import Router
from torch_plugins.config import DenseMoE
from torch_plugins.dense_moe_attention import sparse_heads


def _can_leave_out(core_attention: Any) -> bool:
    """Whether it is softmax attention by the tensors that it is given, and by nothing else."""
    config = core_attention.config
    return (
        type(core_attention) is DotProductAttention
        and config.window_size is None
        and not config.apply_query_key_layer_scaling
        and getattr(core_attention, "softmax_offset", None) is None
    )


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
            expert_of_head = torch.arange(first, first + heads) % self.router.experts
            self.register_buffer("expert_of_head", expert_of_head, persistent=False)
            self.experts_per_group = heads // self.num_query_groups_per_partition
            self._scores: Tensor | None = None
            self._kept: Tensor | None = None
            self.linear_proj.register_forward_pre_hook(self._weigh)
            self._leave_out(config, group)

        def _leave_out(self, config: Any, group: Any) -> None:
            """Let inference compute kept heads only, where the modules are Megatron's own."""
            linears = self.linear_qkv, self.linear_proj
            if not all(projections.can_leave_out(linear) for linear in linears):
                return
            if not _can_leave_out(self.core_attention):
                return
            self.core_attention.forward = partial(self._attend, self.core_attention.forward)
            self.linear_proj.forward = partial(self._output, self.linear_proj.forward)
            if config.num_query_groups >= group.size():  # else rows of queries are anywhere
                self.linear_qkv.forward = partial(self._queries, self.linear_qkv.forward)

        def _queries(self, original: Callable[..., Any], x: Tensor, *args: Any) -> Any:
            if self._kept is None:
                return original(x, *args)
            groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
            return projections.queries(self.linear_qkv, x, self._kept, groups, size), None

        def _output(self, original: Callable[..., Any], heads: Tensor, *args: Any) -> Any:
            if self._kept is None:
                return original(heads, *args)
            groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
            return projections.output(self.linear_proj, heads, self._kept, groups, size), None

        def _weigh(self, linear: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            """Multiply each head's output, ``[S, B, H P]``, by its expert's score."""
            heads, scores = args[0], self._scores
            assert scores is not None
            own = scores.index_select(-1, self.expert_of_head).unsqueeze(-1)
            return ((heads.unflatten(-1, (own.shape[-2], -1)) * own).flatten(-2), *args[1:])

        def _attend(
            self,
            original: Callable[..., Tensor],
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            """The core attention of kept experts, ``[S, B, H P]``; Megatron's mask is true where
            nothing is seen."""
            length, keys = query.shape[0], key.shape[0]
            one = mask is None and length == 1
            fits = mask is not None and mask.shape[-2:] == (length, keys)
            if self._kept is None or not (one or fits):
                return original(query, key, value, mask, *args, **kwargs)
            out = sparse_heads(
                query.transpose(0, 1),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                self._kept.transpose(0, 1),
                None if mask is None else ~mask,
                self.core_attention.softmax_scale,
            )
            return out.transpose(0, 1).flatten(2)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            scores = self.router(hidden_states)
            kept = self.router.keep(scores)
            own = self.expert_of_head[: self.experts_per_group]
            self._kept = None if kept is None else kept.index_select(-1, own)
            self._scores = scores if kept is None else scores * kept
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                self._scores = self._kept = None

    ExpertAttention.__name__ = ExpertAttention.__qualname__ = f"Expert{base.__name__}"
    return ExpertAttention
