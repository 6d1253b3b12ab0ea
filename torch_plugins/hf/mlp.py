"""MLP of the decoder."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_plugin_decoder import PluginDecoderConfig


class PluginDecoderMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` when not gated."""

    def __init__(self, config: PluginDecoderConfig) -> None:
        super().__init__()
        inner, bias = config.intermediate_size, config.mlp_bias
        if config.mlp_gated:
            self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.gated = config.mlp_gated
        self.act_fn = ACT2FN[config.hidden_act]

    def _inner(self, x: Tensor) -> Tensor:
        """What ``down`` reads, ``[..., intermediate_size]``."""
        if self.gated:
            return self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.act_fn(self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._inner(x))
