"""DS-MoE in the decoder: routers, experts of the MLP, experts of attention (arXiv 2404.05567).

In training every expert computes every token. In evaluation those compute that the configuration's
``inference`` and ``attention_inference`` keep; ``set_experts`` of the model changes the choice.

Shapes: B batch, S tokens, D hidden size, N experts, F width of one expert, A attention experts, J
key-value heads, P head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..auxiliary_loss import AuxiliaryLoss, Scope
from ..dense_moe import gate_heads, mutual_information_loss, scores, shared_marginal
from .attention import PluginDecoderAttention
from .configuration_plugin_decoder import PluginDecoderConfig
from .mlp import PluginDecoderMLP

REMEDY = (
    "DeepSpeed does so with the plugin installed. Anywhere else, before the first step: scope = "
    "Scope(); bind(model, scope); scope.scale = 1 / gradient_accumulation_steps (Scope and bind of "
    "torch_plugins.auxiliary_loss; times the loss scale of a gradient scaler). Or train without "
    "these losses: dense_moe.mi_weight_mlp and dense_moe.mi_weight_attention 0"
)


class MutualInformation(AuxiliaryLoss):
    """The loss ``L_MI`` of a router, with the remedy of those who train without a host for it."""

    def __init__(self, name: str, coefficient: float) -> None:
        super().__init__(name, coefficient)
        self.scope = Scope(REMEDY)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scope": Scope(REMEDY)}


class PluginDecoderRouter(nn.Module):
    """Scores ``softmax(weight x)`` or ``softmax(weight gelu(hidden x))``, ``[..., D] -> [..., N]``.

    Its loss is attached to the scores. All positions count in it, padding too.

    Args:
        kind: of experts, ``mlp`` or ``attention``.
    """

    def __init__(self, config: PluginDecoderConfig, kind: str) -> None:
        super().__init__()
        feature = config.experts
        assert feature is not None
        attention = kind == "attention"
        experts = feature.attention_experts if attention else feature.num_experts
        coefficient = feature.mi_weight_attention if attention else feature.mi_weight_mlp
        width, self.hidden = config.hidden_size, None
        if feature.router == "mlp":
            width = feature.router_hidden_size
            self.hidden = nn.Linear(config.hidden_size, width, bias=False)
        self.weight = nn.Parameter(torch.empty(experts or 0, width))
        self.loss = MutualInformation(f"mi_{kind}", coefficient) if coefficient else None
        self.shares_marginal = feature.mi_reduction == "data-parallel"

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x if self.hidden is None else F.gelu(self.hidden(x)), self.weight)
        probabilities = scores(logits)
        if self.loss is None or not torch.is_grad_enabled():
            return probabilities
        marginal = None
        if self.shares_marginal and dist.is_available() and dist.is_initialized():
            assert dist.group.WORLD is not None
            marginal = shared_marginal(logits, dist.group.WORLD)
        return self.loss.attach(probabilities, mutual_information_loss(logits, marginal))


class PluginDecoderDenseMoE(PluginDecoderMLP):
    """``sum_i S_i down_i(act(up_i x))``, or with gated experts: one wide MLP (equation 1)."""

    def __init__(self, config: PluginDecoderConfig) -> None:
        super().__init__(config)
        self.router = PluginDecoderRouter(config, "mlp")

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x)
        inner = self._inner(x).unflatten(-1, (weights.shape[-1], -1))
        return self.down_proj((inner * weights.unsqueeze(-1)).flatten(-2))


class PluginDecoderDenseMoEAttention(PluginDecoderAttention):
    """Grouped-query attention whose head ``j A + i`` is multiplied by the score of expert i before
    the output projection (equations 7 and 8)."""

    def __init__(self, config: PluginDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.router = PluginDecoderRouter(config, "attention")

    def _project(self, heads: Tensor, hidden_states: Tensor) -> Tensor:
        by_head = heads.unflatten(-1, (-1, self.head_dim))
        gated = gate_heads(by_head, self.router(hidden_states)).flatten(-2)
        return super()._project(gated, hidden_states)
