"""A decoder with experts in plain torch, expert by expert and head by head, from whole weights.

Weights have Megatron's names and are those of all tensor-parallel processes together; RMSNorm, no
positions, causal attention, no biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_plugins.config import CrossLayerAttention, DenseMoE, LadderResidual

Weights = dict[str, Tensor]


@dataclass
class Naive:
    """The function of the weights; ``router_logits`` fills with each router's, in order."""

    weights: Weights
    feature: DenseMoE
    config: Any
    keep: bool = False
    """Apply the rules of inference."""
    router_logits: list[tuple[str, Tensor]] = field(default_factory=list)

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config.layernorm_epsilon
        return self.weights[name] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    def scores(self, x: Tensor, kind: str, name: str) -> Tensor:
        hidden = self.weights.get(f"{name}.hidden.weight")
        if hidden is not None:
            x = x @ hidden.T
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        logits = x @ self.weights[f"{name}.weight"].T
        self.router_logits.append((kind, logits))
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return p * self.mask(p.detach(), kind) if self.keep else p

    def mask(self, p: Tensor, kind: str) -> Tensor:
        attention = kind == "attention"
        rule = self.feature.attention_inference if attention else self.feature.inference
        k = self.feature.attention_top_k if attention else self.feature.top_k
        if rule == "threshold":
            return p.shape[-1] * p > self.feature.threshold
        if rule == "top-k":
            return p >= p.sort(-1, descending=True).values[..., k - 1 : k]
        return torch.ones_like(p)

    def mlp(self, x: Tensor, layer: str) -> Tensor:
        up, down = (self.weights[f"{layer}.mlp.linear_fc{i}.weight"] for i in (1, 2))
        experts = self.feature.num_experts or 1
        width = down.shape[1] // experts
        s = self.scores(x, "mlp", f"{layer}.mlp.router") if self.feature.num_experts else None
        out = torch.zeros_like(x)
        for i in range(experts):
            rows = slice(i * width, (i + 1) * width)
            if self.config.gated_linear_unit:
                gate, value = up.chunk(2)
                inner = x @ gate[rows].T
                inner = inner * torch.sigmoid(inner) * (x @ value[rows].T)
            else:
                inner = x @ up[rows].T
                inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            expert = inner @ down[:, rows].T
            out = out + (expert if s is None else s[..., i : i + 1] * expert)
        return out

    def attention(self, x: Tensor, layer: str, kv: Any) -> tuple[Tensor, Any]:
        """``x`` is ``[b, s, h]``; ``kv`` the keys and values to share, or None."""
        config, groups = self.config, self.config.num_query_groups
        size, per = config.kv_channels, config.num_attention_heads // groups
        rows = self.weights[f"{layer}.self_attention.linear_qkv.weight"]
        rows = rows.unflatten(0, (groups, -1, size))
        bias = self.weights.get(f"{layer}.self_attention.linear_qkv.bias", torch.zeros(()))
        bias = bias.expand(rows.shape[:3].numel()).view(rows.shape[:3])

        def head(j: int, i: int) -> Tensor:
            return x @ rows[j, i].T + bias[j, i]

        if kv is None:
            kv = [(head(j, per), head(j, per + 1)) for j in range(groups)]
        experts = self.feature.attention_experts
        s = self.scores(x, "attention", f"{layer}.self_attention.router") if experts else None
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        heads = []
        for j in range(groups):
            for i in range(per):
                key, value = kv[j]
                products = head(j, i) @ key.transpose(1, 2) / math.sqrt(size)
                out = products.masked_fill(future, -math.inf).softmax(-1) @ value
                heads.append(out if s is None else s[..., i : i + 1] * out)
        proj = self.weights[f"{layer}.self_attention.linear_proj.weight"]
        return torch.cat(heads, -1) @ proj.T, kv

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
            normed = self.norm(reads, f"{name}.input_layernorm.weight")
            a, kv = self.attention(normed, name, kv)
            middle = x + a
            reads = x if index in ladders else middle
            m = self.mlp(self.norm(reads, f"{name}.pre_mlp_layernorm.weight"), name)
            before, x = middle, middle + m
        x = self.norm(x, "decoder.final_layernorm.weight")
        return x @ self.weights["output_layer.weight"].T


def mutual_information_losses(naive: Naive) -> Tensor:
    """Sum over the routers of weight times ``-H(e) + mean H(e | x)``."""
    total = torch.zeros(())
    for kind, logits in naive.router_logits:
        weight = getattr(naive.feature, f"mi_weight_{kind}")
        p = logits.flatten(0, -2).softmax(-1)
        marginal = p.mean(0)
        loss = (marginal * marginal.log()).sum() - (p * p.log()).sum(-1).mean()
        total = total + weight * loss
    return total
