"""DS-MoE in the decoder: experts of the MLP and experts of attention (arXiv 2404.05567).

In training every expert computes every token. In evaluation those compute that the configuration's
``inference`` and ``attention_inference`` keep; ``set_experts`` of the model changes the choice.

Shapes: B batch, S tokens, D hidden size, N experts, F width of one expert, A attention experts, J
key-value heads, P head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ..config import ConfigError, DenseMoE, did_you_mean
from ..dense_moe import Activation, Weights, gate_heads, sparse_mlp
from ..dense_moe_attention import Chosen, sparse_attention
from .attention import PluginDecoderAttention
from .configuration_plugin_decoder import PluginDecoderConfig, check_experts
from .mlp import PluginDecoderMLP
from .router import PluginDecoderRouter

CHOICE = ("inference", "top_k", "threshold", "attention_inference", "attention_top_k")
"""Fields of ``dense_moe`` that may change while the model is in memory."""

SPARSE_ATTENTION = ("sdpa", "eager")
"""Attention implementations that hand over the mask that sparse attention reads."""


class PluginDecoderDenseMoE(PluginDecoderMLP):
    """``sum_i S_i down_i(act(up_i x))``, or with gated experts: one wide MLP (equation 1).

    With some experts only it reads the weights of its projections without calling these, or, where
    no gradient is wanted, what ``torch_plugins.dense_moe_int4.pack_experts`` made of them.
    """

    def __init__(self, config: PluginDecoderConfig) -> None:
        super().__init__(config)
        self.router = PluginDecoderRouter(config, "mlp")
        self.packed: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x)
        if self.router.sparse:
            return self._sparse(x, weights)
        inner = self._inner(x).unflatten(-1, (weights.shape[-1], -1))
        return self.down_proj((inner * weights.unsqueeze(-1)).flatten(-2))

    def _sparse(self, x: Tensor, weights: Tensor) -> Tensor:
        chosen = weights.flatten(0, -2), self.router.keep(weights).flatten(0, -2)
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed(x.flatten(0, -2), *chosen).view(*x.shape)
        up, down, _, activation = self.expert_weights()
        return sparse_mlp(x.flatten(0, -2), *chosen, up, down, activation).view(*x.shape)

    def expert_weights(self) -> tuple[Weights, Tensor, int, Activation]:
        """Matrices up and down, the number of experts, and their activation."""
        up = weight_of(self, "up_proj")
        ups = (weight_of(self, "gate_proj"), up) if self.gated else up
        return ups, weight_of(self, "down_proj"), self.router.weight.shape[0], self.act_fn


class PluginDecoderDenseMoEAttention(PluginDecoderAttention):
    """Grouped-query attention whose head ``j A + i`` is multiplied by the score of expert i before
    the output projection (equations 7 and 8).

    With some experts only it reads the weights of ``q_proj`` and ``o_proj`` without calling these,
    attends through ``scaled_dot_product_attention``, and returns no attention weights.
    """

    def __init__(self, config: PluginDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.router = PluginDecoderRouter(config, "attention")

    def _project(self, heads: Tensor, hidden_states: Tensor) -> Tensor:
        by_head = heads.unflatten(-1, (-1, self.head_dim))
        gated = gate_heads(by_head, self.router(hidden_states)).flatten(-2)
        return super()._project(gated, hidden_states)

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
        cache = past_key_values if cache is None else cache
        if not self.router.sparse:
            shared = (stream, key, value, position_embeddings, attention_mask)
            return super().forward(hidden_states, *shared, cache=cache, **kwargs)
        self._check_implementation()
        if self.is_producer:
            kv_input = hidden_states if self.kv_norm is None else self.kv_norm(stream)
            key, value = self._key_value(kv_input, position_embeddings, cache)
        assert key is not None
        assert value is not None
        out = self._sparse(hidden_states, key, value, position_embeddings, attention_mask)
        return out, None, key, value

    def _check_implementation(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in SPARSE_ATTENTION:
            raise ConfigError(
                f"attention implementation {implementation!r}: with dense_moe.attention_inference "
                f'other than "dense" use {" or ".join(SPARSE_ATTENTION)} '
                '(set_attn_implementation("sdpa")), or compute all experts with '
                'set_experts(attention_inference="dense")'
            )

    def _sparse(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The kept experts of every token, ``[B, S, D]``."""
        weights = self.router(x)
        order = (key.shape[1], weights.shape[-1], self.head_dim)
        into = weight_of(self, "q_proj").unflatten(0, order)
        bias = None if self.q_proj.bias is None else self.q_proj.bias.unflatten(0, order)
        out_of = weight_of(self, "o_proj").unflatten(1, order)

        def query(group: Chosen) -> Tensor:
            own = None if bias is None else bias[:, group.expert].flatten()
            projected = F.linear(group.rows(x), into[:, group.expert].flatten(0, 1), own)
            turn = None if rotary is None else (group.rows(rotary[0]), group.rows(rotary[1]))
            return self._heads(projected, self.q_norm, turn)

        def output(expert: int, heads: Tensor) -> Tensor:
            return F.linear(heads, out_of[:, :, expert].flatten(1))

        kept = self.router.keep(weights)
        return sparse_attention(
            query, output, key, value, weights, kept, x.shape[-1], mask, self.scaling
        )


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The weight of a projection that is read without calling it.

    Raises:
        ConfigError: something else has taken its place, an adapter or a quantized layer, whose
            function its weight does not tell.
    """
    projection = getattr(module, name)
    if type(projection) is not nn.Linear:
        kind = type(projection)
        raise ConfigError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}: evaluation with some of the "
            "experts reads the weights of plain linear layers; merge adapters and do not quantize, "
            'or compute all experts with set_experts(inference="dense", '
            'attention_inference="dense")'
        )
    return projection.weight


def set_experts(model: nn.Module, config: PluginDecoderConfig, choice: dict[str, Any]) -> None:
    """See ``PluginDecoderPreTrainedModel.set_experts``."""
    if config.dense_moe is None:
        raise ConfigError("set_experts: the model has no dense_moe")
    for name in choice:
        if name not in CHOICE:
            raise ConfigError(f"set_experts: {name}{did_you_mean(name, list(CHOICE))}")
    section = {**config.dense_moe, **choice}
    for rule, k in (("inference", "top_k"), ("attention_inference", "attention_top_k")):
        if rule in choice and k not in choice:
            section.pop(k, None)  # it went with the rule before
    feature = DenseMoE.from_dict(section)
    check_experts(config, feature)
    config.dense_moe = section
    for module in model.modules():
        if isinstance(module, PluginDecoderRouter):
            module.choose(feature)
