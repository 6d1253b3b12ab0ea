"""Attention and layers of Cross-Layer Attention, as subclasses of whichever the spec names.

A layer of a group hands keys and values on in the :class:`~megatron_plugins.carry.Carry`, rotated:
they are what the producer's own core attention was given. So their gradient sums over all layers of
the group, through activation recomputation too.

Shapes: S sequence, B batch, K key-value heads of this rank, P head dimension, T tensor-parallel
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_plugins import carry
from megatron_plugins.carry import Carry
from megatron_plugins.cross_layer_attention.groups import Role

KEY, VALUE = "keys", "values"

Build = Callable[..., Any]
"""Makes a norm or a linear, called as Megatron calls it."""


@cache
def producer_class(base: type) -> type:
    """A subclass of ``SelfAttention`` that keeps the keys and values it attends to in
    ``shared``."""

    attention_class: Any = base

    class ProducerAttention(attention_class):
        def __init__(self, *args: Any, role: Role, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.role = role
            self.shared: tuple[Tensor, Tensor] | None = None
            self.core_attention.register_forward_pre_hook(self._note)

        def _note(self, core_attention: Any, args: tuple[Any, ...]) -> None:
            if not (self.checkpoint_core_attention and self.training):
                self.shared = args[1], args[2]

        def _checkpointed_attention_forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.shared = key, value  # the core attention sees detached copies
            return super()._checkpointed_attention_forward(query, key, value, *args, **kwargs)

    return ProducerAttention


@cache
def queries_class(base: type) -> type:
    """A subclass of ``SelfAttention`` whose ``linear_qkv`` makes queries only, ``[S, B, H * P]``
    with the heads in order; keys and values come from :meth:`keys_and_values`."""

    attention_class: Any = base

    class QueryAttention(attention_class):
        def __init__(self, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
            build = submodules.linear_qkv
            width = config.kv_channels * config.num_attention_heads

            def queries(input_size: int, output_size: int, **options: Any) -> Any:
                return build(input_size, width, **options)

            submodules = replace(submodules, linear_qkv=queries)
            super().__init__(config, submodules, *args, **kwargs)

        def get_query_key_value_tensors(
            self, hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            query, _ = self.linear_qkv(hidden_states)
            query = query.view(*query.shape[:-1], -1, self.hidden_size_per_attention_head)
            if self.q_layernorm is not None:
                query = self.q_layernorm(query)
            return query, *self.keys_and_values(hidden_states)

        def keys_and_values(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
            raise NotImplementedError

    return QueryAttention


@cache
def consumer_class(base: type) -> type:
    """A subclass of ``SelfAttention`` without keys and values of its own: it attends to
    ``shared``, which its layer sets."""

    query_class: Any = queries_class(base)

    class ConsumerAttention(query_class):
        def __init__(self, *args: Any, role: Role, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.role = role
            self.shared: tuple[Tensor, Tensor] | None = None
            self.k_layernorm = None

        def keys_and_values(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
            if self.shared is None:  # they are in the cache of a dynamic inference context
                return None, None
            key, value = self.shared
            if key.dim() == 3:  # packed sequences, whose batch dimension Megatron takes out
                key, value = key.unsqueeze(1), value.unsqueeze(1)
            return key, value

        def _adjust_key_value_for_inference(
            self,
            inference_context: Any,
            query: Tensor,
            key: Tensor | None,
            value: Tensor | None,
            rotary_pos_emb: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            """Nothing is written to a cache, and only the queries are left to rotate."""
            if inference_context is not None and not inference_context.is_static_batching():
                offset = self._get_pp_layer_offset_for_inference()
                key, value, table = inference_context.key_value_cache(self.layer_number - offset)
                rotary_pos_emb = _of_queries(rotary_pos_emb)
                return query, key, value, rotary_pos_emb, self.attn_mask_type, table
            if key is None:
                raise RuntimeError(
                    f"layer {self.role.index} got no keys and values of layer {self.role.producer}"
                )
            given = key, value
            if inference_context is not None:
                # Megatron writes what it is given into the layer's cache: lend it the producer's,
                # and what stands there.
                caches = inference_context.key_value_memory_dict
                caches[self.layer_number] = caches[self.role.producer + 1]
                start = inference_context.sequence_len_offset
                first = inference_context.batch_size_offset
                new = slice(start, start + query.shape[0]), slice(first, first + query.shape[1])
                given = tuple(cache[new] for cache in caches[self.layer_number])
            adjusted = super()._adjust_key_value_for_inference(
                inference_context, query, *given, rotary_pos_emb, *args, **kwargs
            )
            if inference_context is not None:
                del caches[self.layer_number]
            query, _, _, rotary_pos_emb, *rest = adjusted
            return query, key, value, _of_queries(rotary_pos_emb), *rest

    return ConsumerAttention


def _of_queries(rotary_pos_emb: Any) -> Any:
    return None if rotary_pos_emb is None else (rotary_pos_emb[0], None)


@cache
def own_norm_class(base: type) -> type:
    """A producer whose keys and values read a norm of their own, on the layer's input.

    ``linear_kv`` is built like ``linear_qkv``: one that contains the norm contains this one too,
    else ``kv_norm`` builds it. Its rows are, for each key-value head, P of the key and P of the
    value.
    """

    query_class: Any = queries_class(producer_class(base))

    class OwnNormAttention(query_class):
        def __init__(
            self, config: Any, submodules: Any, *args: Any, kv_norm: Build | None, **kwargs: Any
        ) -> None:
            build, built = submodules.linear_qkv, []
            width = 2 * config.kv_channels * config.num_query_groups

            def both(input_size: int, output_size: int, **options: Any) -> Any:
                built.append(build(input_size, width, **options))
                return build(input_size, output_size, **options)

            submodules = replace(submodules, linear_qkv=both)
            super().__init__(config, submodules, *args, **kwargs)
            (self.linear_kv,) = built
            self.kv_norm = kv_norm and kv_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            self.stream: Tensor | None = None

        def keys_and_values(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stream if self.kv_norm is None else self.kv_norm(self.stream)
            heads, _ = self.linear_kv(x)
            groups, head = self.config.num_query_groups, self.hidden_size_per_attention_head
            if groups < self.world_size:
                heads = _group_of_rank(heads, groups, self.pg_collection.tp)
            heads = heads.view(*heads.shape[:-1], -1, 2 * head)
            key, value = heads.split(head, dim=-1)
            if self.k_layernorm is not None:
                key = self.k_layernorm(key)
            return key, value

        def _backward_qkv_proj(self) -> None:
            super()._backward_qkv_proj()
            self.linear_kv.backward_dw()

    return OwnNormAttention


def _group_of_rank(heads: Tensor, groups: int, group: Any) -> Tensor:
    """Fewer key-value heads than ranks: T / groups ranks, whose queries attend to one head, each
    hold a part of it. ``[S, B, 2 * P * groups / T] -> [S, B, 2 * P]``."""
    from megatron.core.tensor_parallel.mappings import (
        all_gather_last_dim_from_tensor_parallel_region,
    )

    heads = all_gather_last_dim_from_tensor_parallel_region(heads, group=group)
    return heads.chunk(groups, dim=-1)[group.rank() * groups // group.size()]


@cache
def sharing_layer_class(base: type) -> type:
    """A subclass of ``TransformerLayer`` that hands the keys and values of its group on."""

    layer_class: Any = base

    class SharingLayer(layer_class):
        def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            attention = self.self_attention
            if not attention.role.own_norm:
                return super()._forward_attention(hidden_states, *args, **kwargs)
            attention.stream = hidden_states
            result = super()._forward_attention(hidden_states, *args, **kwargs)
            attention.stream = None
            return result

        def forward(
            self, *args: Any, context: Carry | None = None, **kwargs: Any
        ) -> tuple[Tensor, Carry | None]:
            attention = self.self_attention
            role: Role = attention.role
            key, value = carry.get(context, KEY), carry.get(context, VALUE)
            if role.consumes and key is not None:
                attention.shared = key, value
            context = carry.put(context, {KEY: None, VALUE: None})
            hidden_states, context = super().forward(*args, context=context, **kwargs)
            shared, attention.shared = attention.shared, None
            if role.index == role.last or shared is None:
                return hidden_states, context
            if self.training and not torch.is_grad_enabled():
                # Kept between recomputed chunks: not as views of all queries, keys and values.
                shared = tuple(x.contiguous() for x in shared)
            return hidden_states, carry.put(context, dict(zip((KEY, VALUE), shared, strict=True)))

    SharingLayer.__name__ = SharingLayer.__qualname__ = f"Sharing{base.__name__}"
    return SharingLayer
