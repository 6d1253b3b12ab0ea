"""Naive forward pass of an exported model: the ground truth of exports and tests.

Written from the formulas alone, independent of ``torch_plugins/hf`` and of transformers, with no
cache and no fused op, in the precision of the tensors it is given (fp64 for tests). It reads the
tensors and the ``config.json`` of a ``plugin_decoder``, ``llama`` or ``granite`` folder, and W4A4's
clips of such a one.

Shapes: B batch, S tokens, H heads, P head dimension, R rotated part of P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import (
    W4A4,
    ConfigError,
    CrossLayerAttention,
    DenseMoE,
    DesyncResidual,
    LadderResidual,
)

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
Heads = list[Tensor]
"""One ``[B, S, P]`` per head."""


def logits(tensors: Tensors, config: Config, input_ids: Tensor) -> Tensor:
    """Logits of every position.

    The stream is kept as ``r + a + m``, with the last attention ``a`` and the last MLP ``m`` still
    apart: the attention of a ladder layer reads ``r + a``, its MLP ``r + a + m``, each before the
    other's new output is added (arXiv 2501.06589, section 3). A standard layer adds all first. The
    keys and values of a layer are kept for the consumers behind it (arXiv 2405.12981, section 2).

    Args:
        tensors: the state dict, in Hugging Face names.
        config: the content of ``config.json``.
        input_ids: ``[B, S]`` without padding.

    Returns:
        ``[B, S, vocab]`` in the dtype of the tensors.

    Raises:
        ConfigError: an activation, normalization, position embedding, RoPE type or quantization
            not known here.
    """
    check_quantization(tensors, config)
    if config.get("desync_residual") is not None:
        return desync_logits(tensors, config, input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    ladder, producers = ladder_layers(config), kv_producers(config)
    kv: dict[int, tuple[Heads, Heads]] = {}
    scale = config.get("residual_multiplier", 1.0)
    r = embed(tensors, config, input_ids, positions)
    a = m = torch.zeros_like(r)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        r = r + a if index in ladder else r + a + m
        if producers[index] == index:
            kv[index] = keys_and_values(tensors, config, layer, r, positions)
        a = scale * attention(tensors, config, layer, r, positions, *kv[producers[index]])
        if index in ladder:
            r = r + m
            m = scale * mlp(tensors, config, layer, r)
        else:
            m = scale * mlp(tensors, config, layer, r + a)
    return head(tensors, config, r + a + m)


def head(tensors: Tensors, config: Config, stream: Tensor) -> Tensor:
    out = norm(tensors, config, "model.norm", stream)
    head = "lm_head" if "lm_head.weight" in tensors else "model.embed_tokens"
    return out @ tensors[f"{head}.weight"].T / config.get("logits_scaling", 1.0)


def desync_logits(tensors: Tensors, config: Config, input_ids: Tensor) -> Tensor:
    """Desync Residual, one rank after another, each with its rows and columns of every matrix.

    Where a module reduces, all ranks go on with the mean of their streams and the sum of their
    outputs; elsewhere each adds its own output to its own stream."""
    feature = DesyncResidual.from_dict(config["desync_residual"])
    reduces = iter(feature.resolve(config["num_hidden_layers"]))
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    scale = config.get("residual_multiplier", 1.0)
    count, width = feature.ranks, config["hidden_size"]
    ranks = [RankTensors(tensors, rank, count, width) for rank in range(count)]
    streams = [embed(tensors, config, input_ids, positions) for _ in ranks]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for module in ("attention", "mlp"):
            outputs = []
            for own, x in zip(ranks, streams, strict=True):
                if module == "attention":
                    kv = keys_and_values(own, config, layer, x, positions)
                    outputs.append(scale * attention(own, config, layer, x, positions, *kv))
                else:
                    outputs.append(scale * mlp(own, config, layer, x))
            if next(reduces):
                one = sum(outputs) + sum(streams) / count
                streams = [one for _ in ranks]
            else:
                streams = [x + output for x, output in zip(streams, outputs, strict=True)]
    return head(tensors, config, streams[0])


class RankTensors(Mapping[str, Tensor]):
    """What one of ``ranks`` tensor-parallel ranks has of the layers; ``width`` is the stream's."""

    def __init__(self, tensors: Tensors, rank: int, ranks: int, width: int) -> None:
        self.tensors, self.rank, self.ranks, self.width = tensors, rank, ranks, width

    def __getitem__(self, name: str) -> Tensor:
        tensor, module = self.tensors[name], name.split(".")[-2]
        if module.endswith("layernorm"):
            parts = tensor.split(self.width)
            return parts[self.rank] if len(parts) > 1 else tensor
        if module in ("q_norm", "k_norm"):
            return tensor
        columns = module in ("o_proj", "down_proj")
        return tensor.chunk(self.ranks, dim=1 if columns else 0)[self.rank]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def ladder_layers(config: Config) -> tuple[int, ...]:
    section = config.get("ladder_residual")
    if section is None:
        return ()
    return LadderResidual.from_dict(section).resolve(config["num_hidden_layers"])


def kv_producers(config: Config) -> tuple[int, ...]:
    layers = config["num_hidden_layers"]
    section = config.get("cross_layer_attention")
    if section is None:
        return tuple(range(layers))
    return CrossLayerAttention.from_dict(section).resolve(layers)


def embed(tensors: Tensors, config: Config, input_ids: Tensor, positions: Tensor) -> Tensor:
    x = tensors["model.embed_tokens.weight"][input_ids]
    kind = config.get("position_embedding_type", "rope")
    if kind == "learned_absolute":
        x = x + tensors["model.embed_positions.weight"][positions]
    elif kind not in ("rope", "none"):
        raise ConfigError(f"position_embedding_type {kind!r} is unknown to the reference")
    return x * config.get("embedding_multiplier", 1.0)


def dense(tensors: Tensors, config: Config, name: str, x: Tensor) -> Tensor:
    weight = tensors[f"{name}.weight"]
    if name in quantized_layers(config):
        feature = W4A4.from_dict(config["quantization_config"]["feature"])
        x = quantized_input(tensors, name, x, feature)
        weight = quantized_weight(weight, feature)
    y = x @ weight.T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def quantized_layers(config: Config) -> list[str]:
    section = config.get("quantization_config") or {}
    return section["modules"] if section.get("quant_method") == "torch_plugins_w4a4" else []


def check_quantization(tensors: Tensors, config: Config) -> None:
    """Refuse what :func:`dense` would leave out."""
    section, names = config.get("quantization_config"), quantized_layers(config)
    if section and not names:
        raise ConfigError(f"quantization_config {section}: unknown to the reference")
    for tensor in tensors:
        layer = tensor.partition(".input_quantizer.")[0]
        if layer != tensor and layer not in names:
            raise ConfigError(f"{tensor}: quantization_config.modules does not name its layer")
    if not names:
        return
    feature = W4A4.from_dict(config["quantization_config"]["feature"])
    if feature.grid != "int4":
        raise ConfigError(f"w4a4.grid {feature.grid!r} is unknown to the reference")
    if config.get("dense_moe") is not None:
        raise ConfigError("w4a4 with dense_moe is unknown to the reference")


def quantized_input(tensors: Tensors, name: str, x: Tensor, feature: W4A4) -> Tensor:
    """With clips ``c- < c+``: the nearest of ``2 ** b`` levels from c- to c+, b bits
    (arXiv 2404.03605, section 4). A symmetric quantizer with the clip c has the levels
    ``k 2 c / (2 ** b - 1)``, k from ``-2 ** (b - 1)`` to ``2 ** (b - 1) - 1``."""
    bits = feature.activation_bits
    if not bits:
        return x
    if feature.granularity == "token":
        return symmetric_levels(x, bits, x.abs().amax(-1, keepdim=True))
    high = tensors[f"{name}.input_quantizer.clip_high"]
    if feature.symmetric:
        return symmetric_levels(x, bits, high)
    low = tensors[f"{name}.input_quantizer.clip_low"]
    step = (high - low) / (2**bits - 1)
    return low + step * torch.round((torch.maximum(torch.minimum(x, high), low) - low) / step)


def quantized_weight(weight: Tensor, feature: W4A4) -> Tensor:
    """Each group of a row with a scale of its own."""
    if not feature.weight_bits:
        return weight
    size = feature.weight_group_size
    groups = weight.split(weight.shape[1] if size == -1 else size, dim=1)
    bits = feature.weight_bits
    levels = [symmetric_levels(g, bits, g.abs().amax(-1, keepdim=True)) for g in groups]
    return torch.cat(levels, dim=1)


def symmetric_levels(x: Tensor, bits: int, largest: Tensor) -> Tensor:
    step = 2 * largest / (2**bits - 1)
    codes = torch.round(x / torch.where(step == 0, 1, step))
    return step * codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def norm(tensors: Tensors, config: Config, name: str, x: Tensor) -> Tensor:
    kind = config.get("normalization", "rmsnorm")
    eps = config["norm_eps"] if "norm_eps" in config else config["rms_norm_eps"]
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    elif kind != "rmsnorm":
        raise ConfigError(f"normalization {kind!r} is unknown to the reference")
    y = tensors[f"{name}.weight"] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def heads_of(
    tensors: Tensors, config: Config, layer: str, name: str, x: Tensor, positions: Tensor
) -> Heads:
    """Queries or keys (``name`` is ``q`` or ``k``), normalized if so configured, and rotated; or
    values ``v``."""
    y = dense(tensors, config, f"{layer}.self_attn.{name}_proj", x)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = list(y.split(head_dim, dim=-1))
    if f"{layer}.self_attn.{name}_norm.weight" in tensors:
        heads = [norm(tensors, config, f"{layer}.self_attn.{name}_norm", head) for head in heads]
    return heads if name == "v" else [rotate(config, head, positions) for head in heads]


def keys_and_values(
    tensors: Tensors, config: Config, layer: str, x: Tensor, positions: Tensor
) -> tuple[Heads, Heads]:
    """Of a producer, from the stream ``x``: its norm is ``kv_norm`` where it has one."""
    separate = f"{layer}.self_attn.kv_norm.weight" in tensors
    name = "self_attn.kv_norm" if separate else "input_layernorm"
    x = norm(tensors, config, f"{layer}.{name}", x)
    keys, values = (heads_of(tensors, config, layer, n, x, positions) for n in "kv")
    return keys, values


def attention(
    tensors: Tensors,
    config: Config,
    layer: str,
    x: Tensor,
    positions: Tensor,
    keys: Heads,
    values: Heads,
) -> Tensor:
    """Pre-norm and causal attention, one query head at a time; head h reads group ``h * K / H``."""
    x = norm(tensors, config, f"{layer}.input_layernorm", x)
    queries = heads_of(tensors, config, layer, "q", x, positions)
    scale = config.get("attention_multiplier")
    scale = queries[0].shape[-1] ** -0.5 if scale is None else scale
    future = positions[None, :] > positions[:, None]
    outputs = []
    for head, query in enumerate(queries):
        group = head * len(keys) // len(queries)
        scores = (query @ keys[group].transpose(-1, -2) * scale).masked_fill(future, -math.inf)
        outputs.append(torch.softmax(scores, dim=-1) @ values[group])
    if f"{layer}.self_attn.router.weight" in tensors:
        gates = expert_scores(tensors, config, f"{layer}.self_attn", x)
        count = gates.shape[-1]
        outputs = [gates[..., [h % count]] * output for h, output in enumerate(outputs)]
    return dense(tensors, config, f"{layer}.self_attn.o_proj", torch.cat(outputs, dim=-1))


def rotate(config: Config, x: Tensor, positions: Tensor) -> Tensor:
    """RoPE on ``[B, S, P]``: pair ``(i, i + R/2)`` turns by ``position * frequency_i``.

    Angles are in fp32 as in every implementation, whatever the dtype of the model.
    """
    if config.get("position_embedding_type", "rope") != "rope":
        return x
    rope = config["rope_parameters"]
    rotated = int(x.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    angles = positions[:, None].float() * rope_frequencies(rope, rotated).to(positions.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = rotated // 2
    first, second, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rope_frequencies(rope: Mapping[str, Any], rotated: int) -> Tensor:
    """``theta ** (-2i / R)``; ``linear`` divides by ``factor``, ``llama3`` only the slow ones."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    raise ConfigError(
        f"rope_type {kind!r} is unknown to the reference; use default, linear, llama3"
    )


def mlp(tensors: Tensors, config: Config, layer: str, x: Tensor) -> Tensor:
    """Pre-norm, then ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate."""
    name = config.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is unknown to the reference: {sorted(ACTIVATIONS)}")
    x = norm(tensors, config, f"{layer}.post_attention_layernorm", x)
    if f"{layer}.mlp.router.weight" in tensors:
        return experts(tensors, config, f"{layer}.mlp", x, ACTIVATIONS[name])
    up = dense(tensors, config, f"{layer}.mlp.up_proj", x)
    if f"{layer}.mlp.gate_proj.weight" in tensors:
        inner = ACTIVATIONS[name](dense(tensors, config, f"{layer}.mlp.gate_proj", x)) * up
    else:
        inner = ACTIVATIONS[name](up)
    return dense(tensors, config, f"{layer}.mlp.down_proj", inner)


def experts(
    tensors: Tensors, config: Config, name: str, x: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """``sum_i S_i e_i(x)``, one expert at a time: rows of ``up`` and ``gate``, columns of ``down``
    (arXiv 2404.05567, equation 1)."""
    scores = expert_scores(tensors, config, name, x)
    up, down = tensors[f"{name}.up_proj.weight"], tensors[f"{name}.down_proj.weight"]
    gate = tensors.get(f"{name}.gate_proj.weight")
    width = up.shape[0] // scores.shape[-1]
    total = torch.zeros_like(x)
    for i in range(scores.shape[-1]):
        own = slice(i * width, (i + 1) * width)
        inner = x @ up[own].T
        inner = activation(inner) if gate is None else activation(x @ gate[own].T) * inner
        total = total + scores[..., [i]] * (inner @ down[:, own].T)
    return total


def expert_scores(tensors: Tensors, config: Config, name: str, x: Tensor) -> Tensor:
    """Softmax of a router, 0 where the configuration's choice for inference leaves an expert out:
    ``[B, S, N]``."""
    if f"{name}.router.hidden.weight" in tensors:
        hidden = dense(tensors, config, f"{name}.router.hidden", x)
        scores = torch.softmax(ACTIVATIONS["gelu"](hidden) @ tensors[f"{name}.router.weight"].T, -1)
    else:
        scores = torch.softmax(dense(tensors, config, f"{name}.router", x), -1)
    section = DenseMoE.from_dict(config["dense_moe"])
    attention = name.endswith("self_attn")
    rule = section.attention_inference if attention else section.inference
    k = section.attention_top_k if attention else section.top_k
    above = scores.shape[-1] * scores > section.threshold
    if rule == "threshold":
        return torch.where(above, scores, 0)
    if rule == "threshold-top-k":
        mean = max(1, round(above.sum().item() / above[..., 0].numel()))
        k = mean if k is None else min(k, mean)
    elif rule == "dense":
        return scores
    better = (scores[..., None, :] > scores[..., :, None]).sum(-1)
    return torch.where(better < k, scores, 0)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
