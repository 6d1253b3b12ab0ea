"""A decoder with W4A4 in plain torch, from whole weights; autograd differentiates the rounding as
the straight-through estimator does.

Weights have Megatron's names and are those of all processes together; RMSNorm, no positions, causal
attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_plugins.config import W4A4, CrossLayerAttention, LadderResidual

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EVEN = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]) * 1e-6
"""What a value with an even mantissa is nearer by."""


def through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


def learned(x: Tensor, high: Tensor, low: Tensor, bits: int) -> Tensor:
    steps = (2**bits - 1) / (high - low)
    place = (torch.minimum(torch.maximum(x, low), high) - low) * steps
    return through(place, place.round()) / steps + low


def integers(x: Tensor, bits: int) -> Tensor:
    scale = 2 * x.detach().abs().amax(-1, keepdim=True) / (2**bits - 1)
    most = 2 ** (bits - 1)
    return through(x, (x / scale).round().clamp(-most, most - 1) * scale)


def fp4(x: Tensor, grid: str) -> Tensor:
    size = {"mxfp4": 32, "nvfp4": 16}[grid]
    blocks = x.detach().unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    if grid == "mxfp4":
        scale = 2.0 ** (largest.log2().floor() - 2)
    else:
        whole = largest.max() / (6 * 448)
        scale = (largest / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    y = blocks / scale
    nearest = (y.abs().clamp(max=6).unsqueeze(-1) - E2M1).abs() - EVEN
    return through(x, (E2M1[nearest.argmin(-1)] * y.sign() * scale).flatten(-2))


def kurtosis(y: Tensor) -> Tensor:
    z = y - y.mean(-1, keepdim=True)
    return (z**4).mean(-1) / (z**2).mean(-1) ** 2


@dataclass
class Naive:
    """The function of the weights; ``penalties`` fills with the mean kurtosis of each output."""

    weights: dict[str, Tensor]
    feature: W4A4
    config: Any
    penalties: list[Tensor] = field(default_factory=list)

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config.layernorm_epsilon
        return self.weights[name] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, feature = self.weights[f"{name}.weight"], self.feature
        if feature.selects(name):
            clip = f"{name}.input_quantizer.clip_"
            if feature.activation_bits and feature.grid != "int4":
                x = fp4(x, feature.grid)
            elif feature.activation_bits and feature.granularity == "token":
                x = integers(x, feature.activation_bits)
            elif feature.activation_bits and feature.symmetric:
                step = self.weights[f"{clip}high"] * 2 / (2**feature.activation_bits - 1)
                most = 2 ** (feature.activation_bits - 1)
                x = learned(x, step * (most - 1), -step * most, feature.activation_bits)
            elif feature.activation_bits:
                high, low = self.weights[f"{clip}high"], self.weights[f"{clip}low"]
                x = learned(x, high, low, feature.activation_bits)
            weight = self.quantized(weight)
        return x @ weight.T + self.weights.get(f"{name}.bias", torch.zeros(()))

    def quantized(self, weight: Tensor) -> Tensor:
        feature = self.feature
        if not feature.weight_bits:
            return weight
        if feature.grid != "int4":
            return fp4(weight, feature.grid)
        size = feature.weight_group_size
        size = weight.shape[1] if size == -1 else size
        return integers(weight.unflatten(1, (-1, size)), feature.weight_bits).flatten(1)

    def penalize(self, name: str, *projections: Tensor, of: int | None = None) -> None:
        """Count the mean kurtosis over tokens, or over ``of`` pairs of token and expert."""
        if self.feature.kurtosis_weight and self.feature.selects(name):
            for y in projections:
                total = kurtosis(y).sum()
                self.penalties.append(total / (of or y[..., 0].numel()))

    def mlp(self, x: Tensor, name: str, scale: Tensor | None = None, of: int | None = None) -> Any:
        inner = self.linear(x, f"{name}.linear_fc1")
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, -1)
            self.penalize(f"{name}.linear_fc1", gate, up, of=of)
            inner = gate * torch.sigmoid(gate) * up
        else:
            self.penalize(f"{name}.linear_fc1", inner, of=of)
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        if scale is not None:
            inner = inner * scale
        out = self.linear(inner, f"{name}.linear_fc2")
        self.penalize(f"{name}.linear_fc2", out, of=of)
        return out

    def experts(self, x: Tensor, name: str) -> Tensor:
        flat = x.flatten(0, 1)
        k = self.config.moe_router_topk
        best, chosen = (flat @ self.weights[f"{name}.router.weight"].T).topk(k, -1)
        scores, out = best.softmax(-1), torch.zeros_like(flat)
        for expert in range(self.config.num_moe_experts):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            made = self.mlp(
                flat[token],
                f"{name}.experts.local_experts.{expert}",
                scores[token, place].unsqueeze(-1),
                k * len(flat),
            )
            out = out.index_add(0, token, made)
        return out.view_as(x)

    def attention(self, x: Tensor, layer: str, kv: Any) -> tuple[Tensor, Any]:
        """``x`` is ``[b, s, h]``; ``kv`` the keys and values to share, or None."""
        config, groups = self.config, self.config.num_query_groups
        size, per = config.kv_channels, config.num_attention_heads // groups
        name = f"{layer}.self_attention.linear_qkv"
        y = self.linear(x, name)
        if kv is None:
            heads = y.unflatten(-1, (groups, per + 2, size))
            q, key, value = heads[..., :per, :], heads[..., per, :], heads[..., per + 1, :]
            kv = key, value
            self.penalize(name, q.flatten(2), key.flatten(2), value.flatten(2))
        else:
            q = y.unflatten(-1, (groups, per, size))
            self.penalize(name, y)
        key, value = (each.unsqueeze(3).expand(-1, -1, -1, per, -1) for each in kv)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        products = torch.einsum("bsgpd,btgpd->bgpst", q, key) / math.sqrt(size)
        probs = products.masked_fill(future, -math.inf).softmax(-1)
        out = torch.einsum("bgpst,btgpd->bsgpd", probs, value).flatten(2)
        name = f"{layer}.self_attention.linear_proj"
        out = self.linear(out, name)
        self.penalize(name, out)
        return out, kv

    def logits(self, ids: Tensor, ladder: str | None, sharing: int | None) -> Tensor:
        layers = self.config.num_layers
        ladders = LadderResidual(ladder or "none").resolve(layers)
        producers = CrossLayerAttention(sharing or 1).resolve(layers)
        x = self.weights["embedding.word_embeddings.weight"][ids]
        before, kv = x, None
        for index in range(layers):
            name = f"decoder.layers.{index}"
            kv = kv if producers[index] != index else None
            reads = before if index in ladders else x
            a, kv = self.attention(self.norm(reads, f"{name}.input_layernorm.weight"), name, kv)
            middle = x + a
            reads = x if index in ladders else middle
            normed = self.norm(reads, f"{name}.pre_mlp_layernorm.weight")
            block = self.experts if self.config.num_moe_experts else self.mlp
            before, x = middle, middle + block(normed, f"{name}.mlp")
        x = self.norm(x, "decoder.final_layernorm.weight")
        return x @ self.weights["output_layer.weight"].T
