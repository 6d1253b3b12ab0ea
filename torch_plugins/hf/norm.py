"""Normalization of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_plugin_decoder import PluginDecoderConfig


class PluginDecoderRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, computed in fp32 or wider."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Without the weight."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return wide.to(x.dtype)


def build_norm(config: PluginDecoderConfig, size: int | None = None) -> nn.Module:
    """The configured norm over ``size`` features, by default the hidden size."""
    size = size or config.hidden_size
    if config.normalization == "rmsnorm":
        return PluginDecoderRMSNorm(size, config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)
