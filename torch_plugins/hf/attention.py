"""Rotary embedding and attention of the decoder.

Shapes: B batch, S query tokens, T key tokens, H query heads, K key-value heads, P head dimension,
R rotated part of P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_plugin_decoder import PluginDecoderConfig
from .norm import build_norm


class PluginDecoderRotaryEmbedding(nn.Module):
    """Cosines and sines ``[B, S, R]`` of the rotated part ``R`` of each head.

    The class name, ``original_inv_freq`` and ``compute_default_rope_parameters`` are what
    transformers looks for to rebuild these non-persistent buffers in ``from_pretrained``.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: PluginDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init: Callable[..., tuple[Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: PluginDecoderConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """``theta ** (-2i / R)`` for i in 0 .. R/2, and the scaling of cos and sin (none)."""
        rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, rotated, 2, dtype=torch.float, device=device) / rotated
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary(x_BHSP: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Rotate the first R features of each head, pair ``(i, i + R/2)`` at a time; keep the rest.

    With the operations of the stock models in their order, so that gradients are theirs to the bit.
    """
    rotated = cos_BSR.shape[-1]
    if rotated < x_BHSP.shape[-1]:
        out = apply_rotary(x_BHSP[..., :rotated], cos_BSR, sin_BSR)
        return torch.cat((out, x_BHSP[..., rotated:]), dim=-1)
    along = x_BHSP * cos_BSR.unsqueeze(1)
    first, second = x_BHSP[..., : rotated // 2], x_BHSP[..., rotated // 2 :]
    return along + torch.cat((-second, first), dim=-1) * sin_BSR.unsqueeze(1)


def eager_attention(
    module: nn.Module,
    query_BHSP: Tensor,
    key_BKTP: Tensor,
    value_BKTP: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out; also returns the weights ``[B, H, S, T]``."""
    groups = query_BHSP.shape[1] // key_BKTP.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key_BKTP, value_BKTP))
    scores = torch.matmul(query_BHSP, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query_BHSP.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PluginDecoderAttention(nn.Module):
    """Causal grouped-query attention through transformers' attention interface.

    A consumer of Cross-Layer Attention has queries only and attends to the keys and values of its
    producer, which are rotated and cached there, once (arXiv 2405.12981, section 2.2).
    """

    def __init__(self, config: PluginDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_multiplier
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.is_producer = config.kv_producers[layer_idx] == layer_idx
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        if self.is_producer:
            self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        self.kv_norm = None
        if self.is_producer and config.separate_kv_norm:
            self.kv_norm = build_norm(config)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = None
        if self.is_producer and config.qk_norm:
            self.k_norm = build_norm(config, config.head_dim)

    def _heads(
        self, x: Tensor, norm: nn.Module | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """``[B, S, H * P]`` to ``[B, H, S, P]``, normalized and rotated."""
        x = x.view(*x.shape[:-1], -1, self.head_dim)
        if norm is not None:
            x = norm(x)
        x = x.transpose(1, 2)
        return x if rotary is None else apply_rotary(x, *rotary)

    def _key_value(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a producer ``[B, K, T, P]``, with those that the cache holds."""
        key = self._heads(self.k_proj(x), self.k_norm, rotary)
        value = self._heads(self.v_proj(x), None, None)
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        stream: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Output, weights if the implementation has them, keys and values attended to.

        Args:
            hidden_states: the normed residual stream.
            stream: the residual stream itself, for a separate norm of keys and values.
            key, value: of the producer, for a consumer; a producer ignores them.
        """
        query = self._heads(self.q_proj(hidden_states), self.q_norm, position_embeddings)
        if self.is_producer:
            kv_input = hidden_states if self.kv_norm is None else self.kv_norm(stream)
            cache = past_key_values if cache is None else cache
            key, value = self._key_value(kv_input, position_embeddings, cache)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        out = out.flatten(2).contiguous()
        return self._project(out, hidden_states), weights, key, value

    def _project(self, heads: Tensor, hidden_states: Tensor) -> Tensor:
        """The heads' outputs ``[B, S, H * P]`` through the output projection."""
        projected: Tensor = self.o_proj(heads)
        return projected
