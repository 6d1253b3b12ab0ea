"""Routers of DS-MoE in the decoder, with their loss (arXiv 2404.05567, section 2).

Shapes: D hidden size, N experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..auxiliary_loss import AuxiliaryLoss, Scope
from ..config import DenseMoE
from ..dense_moe import keep, mutual_information_loss, scores, shared_marginal
from .configuration_plugin_decoder import PluginDecoderConfig

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

    In training its loss is attached to the scores; all positions count in it, padding too.

    Args:
        kind: of experts, ``mlp`` or ``attention``.
    """

    kept: tuple[int | None, float | None] | None
    """The choice of experts in evaluation, for ``keep``; None: all."""

    def __init__(self, config: PluginDecoderConfig, kind: str) -> None:
        super().__init__()
        feature = config.experts
        assert feature is not None
        self.kind = kind
        attention = kind == "attention"
        experts = feature.attention_experts if attention else feature.num_experts
        width, self.hidden = config.hidden_size, None
        if feature.router == "mlp":
            width = feature.router_hidden_size
            self.hidden = nn.Linear(config.hidden_size, width, bias=False)
        self.weight = nn.Parameter(torch.empty(experts or 0, width))
        self.settle(feature)

    def settle(self, feature: DenseMoE) -> None:
        """Take the loss, and the choice of experts in evaluation, from ``feature``."""
        attention = self.kind == "attention"
        weight = feature.mi_weight_attention if attention else feature.mi_weight_mlp
        self.loss = MutualInformation(f"mi_{self.kind}", weight) if weight else None
        self.shares_marginal = feature.mi_reduction == "data-parallel"
        self.choose(feature)

    def choose(self, feature: DenseMoE) -> None:
        """Take the choice of experts in evaluation from ``feature``."""
        self.kept = feature.kept(self.kind == "attention")

    @property
    def sparse(self) -> bool:
        """Whether a forward pass now computes some of the experts."""
        return not self.training and self.kept is not None

    def keep(self, weights: Tensor) -> Tensor:
        """Bool, of the shape of the scores."""
        assert self.kept is not None
        return keep(weights, *self.kept)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x if self.hidden is None else F.gelu(self.hidden(x)), self.weight)
        weights = scores(logits)
        if self.loss is None or not (self.training and torch.is_grad_enabled()):
            return weights
        marginal = None
        if self.shares_marginal and dist.is_available() and dist.is_initialized():
            assert dist.group.WORLD is not None
            marginal = shared_marginal(logits, dist.group.WORLD)
        return self.loss.attach(weights, mutual_information_loss(logits, marginal))
