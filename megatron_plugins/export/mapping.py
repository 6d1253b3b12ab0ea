"""Megatron's tensors -> the decoder's, one table for all of them.

Megatron's keys are those of its TransformerEngine spec, whichever spec trained (the local one maps
its names to them): norms belong to the linear behind them. Layers are either stacked along a first
axis (``decoder.layers.mlp.linear_fc2.weight``) or numbered (``decoder.layers.3.mlp...``).

Shapes: D hidden size, F MLP width, H query heads, K key-value heads, G = H / K, P head dimension,
V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_plugins.arguments import features_of
from torch_plugins.config import W4A4, ConfigError

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig

OPTIMIZER = ("optimizer.", "chained_", "opt_param_scheduler")
"""Keys of training state, which no export reads."""

UNFUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_kv.layer_norm_": "self_attention.kv_norm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where a spec without sharded_state_dict_keys_map keeps the norms."""

Convert = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Rule:
    """One tensor of Megatron and what becomes of it."""

    source: str
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    """Of the source, one layer of it; 0 where padding makes it unknown."""
    convert: Convert


def split_heads(
    config: PluginDecoderConfig, interleaved: bool, queries: bool = True, keys: bool = True
) -> Convert:
    """``[K * (G + 2) * P, ...]``, each group its G queries, then key, then value -> q, k, v; or the
    queries alone, or key and value alone."""
    groups, head = config.num_key_value_heads, config.head_dim
    per_group = config.num_attention_heads // groups if queries else 0
    order = rotation_order(config) if interleaved else None

    def convert(tensor: Tensor) -> tuple[Tensor, ...]:
        rest = tensor.shape[1:]
        heads = tensor.view(groups, -1, head, *rest)
        sizes = [per_group] * queries + [1, 1] * keys
        parts = list(heads.split(sizes, dim=1))
        if order is not None:
            turned = queries + keys  # queries and keys; values are last
            parts[:turned] = [part[:, :, order] for part in parts[:turned]]
        return tuple(part.reshape(-1, *rest) for part in parts)

    return convert


def rotation_order(config: PluginDecoderConfig) -> Tensor:
    """Row order ``[P]`` that turns RoPE on pairs ``(2i, 2i + 1)`` into RoPE on ``(i, i + R / 2)``.

    The same permutation of queries and keys leaves their products unchanged.
    """
    rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    even = torch.arange(0, rotated, 2)
    return torch.cat((even, even + 1, torch.arange(rotated, config.head_dim)))


def layer_rules(config: PluginDecoderConfig, args: Namespace, layer: int) -> Iterator[Rule]:
    """What lies in a layer: its weights, and clips beside those of quantized linears."""
    feature = features_of(args).get(W4A4.key())
    for rule in _weight_rules(config, args, layer):
        yield rule
        linear = rule.source.removesuffix(".weight")
        if feature is not None and feature.learned and is_quantized(feature, layer, rule):
            for clip in ("clip_high",) if feature.symmetric else ("clip_high", "clip_low"):
                end = f".input_quantizer.{clip}"
                targets = tuple(name.removesuffix(".weight") + end for name in rule.targets)
                yield Rule(linear + end, targets, (1,), _same_for(len(targets)))


def is_quantized(feature: W4A4, layer: int, rule: Rule) -> bool:
    """Whether a tensor is the weight of a linear that W4A4 selects."""
    linear = rule.source.removesuffix(".weight")
    is_weight = len(rule.shape) == 2 and linear != rule.source
    return is_weight and feature.selects(f"decoder.layers.{layer}.{linear}")


def quantized_linears(config: PluginDecoderConfig, args: Namespace) -> list[str]:
    """Names of the exported linear layers that W4A4 quantizes."""
    feature = features_of(args).get(W4A4.key())
    if feature is None:
        return []
    return [
        f"model.layers.{layer}.{target.removesuffix('.weight')}"
        for layer in range(config.num_hidden_layers)
        for rule in _weight_rules(config, args, layer)
        if is_quantized(feature, layer, rule)
        for target in rule.targets
    ]


def _same_for(count: int) -> Convert:
    """Clips of an input that several linears of the exported model have."""
    return lambda tensor: tuple(tensor.clone() for _ in range(count))


def _weight_rules(config: PluginDecoderConfig, args: Namespace, layer: int) -> Iterator[Rule]:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    attention_ranks, mlp_ranks = _ranks(config, layer)
    norm = "self_attention.linear_qkv.layer_norm_"
    yield from _norm_rules(norm, "input_layernorm", config, args, ranks=attention_ranks)
    yield from _qkv_rules(config, args, produces=config.kv_producers[layer] == layer)
    yield from _linear(
        "self_attention.linear_proj",
        ("self_attn.o_proj",),
        (width, queries),
        config.attention_output_bias,
    )
    norm = "mlp.linear_fc1.layer_norm_"
    yield from _norm_rules(norm, "post_attention_layernorm", config, args, ranks=mlp_ranks)
    experts = config.experts
    if experts is not None and experts.num_experts:
        yield from _expert_rules(config, experts.num_experts)
        yield from _router_rules("mlp", "mlp", config, experts.num_experts)
    elif config.mlp_gated:
        # Whatever the tensor parallel size, all of the gate comes first, then all of the rest.
        halves = ("mlp.gate_proj", "mlp.up_proj")
        chunk: Convert = lambda tensor: tuple(tensor.chunk(2))  # noqa: E731
        yield from _linear("mlp.linear_fc1", halves, (2 * inner, width), config.mlp_bias, chunk)
        yield from _linear("mlp.linear_fc2", ("mlp.down_proj",), (width, inner), config.mlp_bias)
    else:
        yield from _linear("mlp.linear_fc1", ("mlp.up_proj",), (inner, width), config.mlp_bias)
        yield from _linear("mlp.linear_fc2", ("mlp.down_proj",), (width, inner), config.mlp_bias)
    if experts is not None and experts.attention_experts:
        attention = ("self_attention", "self_attn")
        yield from _router_rules(*attention, config, experts.attention_experts)


def _ranks(config: PluginDecoderConfig, layer: int) -> tuple[int, int]:
    """Of a layer's norms before attention and MLP: ranks that have weights of their own."""
    if config.desync is None or config.desync.ranks is None:
        return 1, 1
    places = config.desync.places(config.num_hidden_layers)[2 * layer :][:2]
    attention, mlp = (config.desync.ranks if place.inside else 1 for place in places)
    return attention, mlp


def _expert_rules(config: PluginDecoderConfig, experts: int) -> Iterator[Rule]:
    """Experts, stacked as in stock MoE layers -> one wide MLP, expert after expert. Gates come
    first within each expert there, and within the MLP here."""
    width, inner = config.hidden_size, config.intermediate_size // experts
    halves = ("mlp.gate_proj", "mlp.up_proj") if config.mlp_gated else ("mlp.up_proj",)
    parts = len(halves)

    def rows(tensor: Tensor) -> tuple[Tensor, ...]:
        by_part = tensor.unflatten(1, (parts, inner)).unbind(1)
        return tuple(part.flatten(0, 1) for part in by_part)

    columns: Convert = lambda tensor: (tensor.transpose(0, 1).flatten(1),)  # noqa: E731
    targets = tuple(f"{name}.weight" for name in halves)
    stored = "mlp.experts.experts.linear_fc"
    yield Rule(f"{stored}1.weight", targets, (experts, parts * inner, width), rows)
    yield Rule(f"{stored}2.weight", ("mlp.down_proj.weight",), (experts, width, inner), columns)


def _router_rules(
    source: str, target: str, config: PluginDecoderConfig, experts: int
) -> Iterator[Rule]:
    """A router keeps the names of its matrices."""
    width, feature = config.hidden_size, config.experts
    assert feature is not None
    shapes = {"weight": (experts, width)}
    if feature.router == "mlp":
        hidden = feature.router_hidden_size
        shapes = {"weight": (experts, hidden), "hidden.weight": (hidden, width)}
    for name, shape in shapes.items():
        yield Rule(f"{source}.router.{name}", (f"{target}.router.{name}",), shape, _keep)


def _qkv_rules(config: PluginDecoderConfig, args: Namespace, produces: bool) -> Iterator[Rule]:
    """Queries, keys and values: in one linear, or keys and values in one of their own behind their
    own norm, or none of a consumer."""
    width, bias = config.hidden_size, config.attention_bias
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    interleaved = config.position_embedding_type == "rope" and args.rotary_interleaved
    q, *kv = (f"self_attn.{name}_proj" for name in "qkv")
    if produces and not config.separate_kv_norm:
        split, shape = split_heads(config, interleaved), (queries + keys, width)
        yield from _linear("self_attention.linear_qkv", (q, *kv), shape, bias, split)
    else:
        split = split_heads(config, interleaved, keys=False)
        yield from _linear("self_attention.linear_qkv", (q,), (queries, width), bias, split)
    if produces and config.separate_kv_norm:
        norm = "self_attention.linear_kv.layer_norm_"
        yield from _norm_rules(norm, "self_attn.kv_norm", config, args)
        split = split_heads(config, interleaved, queries=False)
        yield from _linear("self_attention.linear_kv", tuple(kv), (keys, width), bias, split)
    if config.qk_norm:
        order = rotation_order(config) if interleaved else slice(None)
        for name in "qk" if produces else "q":
            source, target = f"self_attention.{name}_layernorm.", f"self_attn.{name}_norm"
            yield from _norm_rules(source, target, config, args, config.head_dim, order)


def _keep(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _linear(
    source: str,
    targets: tuple[str, ...],
    shape: tuple[int, int],
    bias: bool,
    convert: Convert = _keep,
) -> Iterator[Rule]:
    weights = tuple(f"{target}.weight" for target in targets)
    yield Rule(f"{source}.weight", weights, shape, convert)
    if bias:
        biases = tuple(f"{target}.bias" for target in targets)
        yield Rule(f"{source}.bias", biases, shape[:1], convert)


def _norm_rules(
    source: str,
    target: str,
    config: PluginDecoderConfig,
    args: Namespace,
    size: int | None = None,
    order: Tensor | slice = slice(None),
    ranks: int = 1,
) -> Iterator[Rule]:
    """A norm over ``size`` features, by default the hidden size, taken in another ``order``; of
    ``ranks`` with norms of their own, one after another."""
    shape = (ranks * (size or config.hidden_size),)
    # --apply-layernorm-1p keeps the weight minus one.
    plus = 1 if args.layernorm_zero_centered_gamma else 0
    weight: Convert = lambda x: (x[order] + plus if plus else x[order],)  # noqa: E731
    yield Rule(f"{source}weight", (f"{target}.weight",), shape, weight)
    if config.normalization == "layernorm":
        bias: Convert = lambda x: (x[order],)  # noqa: E731
        yield Rule(f"{source}bias", (f"{target}.bias",), shape, bias)


def model_rules(config: PluginDecoderConfig, args: Namespace) -> Iterator[Rule]:
    """What lies outside the layers; the vocabulary's rows are cut to V."""
    table = (0, config.hidden_size)
    cut: Convert = lambda tensor: (tensor[: config.vocab_size],)  # noqa: E731
    yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), table, cut)
    if config.position_embedding_type == "learned_absolute":
        shape = (config.max_position_embeddings, config.hidden_size)
        source = "embedding.position_embeddings.weight"
        yield Rule(source, ("model.embed_positions.weight",), shape, _keep)
    yield from _norm_rules("decoder.final_layernorm.", "model.norm", config, args)
    if not config.tie_word_embeddings:
        yield Rule("output_layer.weight", ("lm_head.weight",), table, cut)


class HFTensors(Mapping[str, Tensor]):
    """Every tensor of the exported model by name, read from the checkpoint when asked for.

    Building it checks that the checkpoint holds exactly the tensors that the configuration implies.

    Args:
        dtype: what to convert to; None keeps the checkpoint's.

    Raises:
        ConfigError: a tensor is missing, of another shape, or unknown.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: PluginDecoderConfig, dtype: torch.dtype | None = None
    ) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self._origin: dict[str, tuple[str, int | None, Rule, int]] = {}
        self._recent: tuple[tuple[str, int | None], tuple[Tensor, ...]] | None = None
        problems: list[str] = []
        known: set[str] = set()
        for name, row, rule, prefix in self._locate(config, checkpoint.args):
            known.add(name)
            shape = tuple(checkpoint.tensors.get(name, ()))
            want = rule.shape if row is None else (config.num_hidden_layers, *rule.shape)
            if name not in checkpoint.tensors:
                problems.append(f"{name} is missing")
            elif len(shape) != len(want) or any(
                w not in (0, s) for s, w in zip(shape, want, strict=True)
            ):
                problems.append(f"{name} is {list(shape)}, not {list(want)}")
            for index, target in enumerate(rule.targets):
                self._origin[prefix + target] = (name, row, rule, index)
        unknown = [k for k in checkpoint.tensors if k not in known and not k.startswith(OPTIMIZER)]
        problems += [f"{key} is not a tensor of this decoder" for key in unknown]
        if problems:
            problems = list(dict.fromkeys(problems))
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ConfigError(
                f"{checkpoint.folder}: its tensors do not fit its arguments:\n  "
                + "\n  ".join(problems[:20])
                + more
            )

    def _locate(
        self, config: PluginDecoderConfig, args: Namespace
    ) -> Iterator[tuple[str, int | None, Rule, str]]:
        """Key in the checkpoint, row of a stack, rule, and prefix of the targets."""
        outside = {rule.source: rule for rule in model_rules(config, args)}
        head = outside.pop("output_layer.weight", None)
        for source, rule in outside.items():
            yield source, None, rule, ""
        for layer in range(config.num_hidden_layers):
            for rule in layer_rules(config, args, layer):
                yield *self._layer_key(rule.source, layer), rule, f"model.layers.{layer}."
        if head is not None:
            yield head.source, None, head, ""

    def _layer_key(self, source: str, layer: int) -> tuple[str, int | None]:
        names = [source]
        names += [
            source.replace(fused, apart)
            for fused, apart in UNFUSED_NORMS.items()
            if source.startswith(fused)
        ]
        for name in names:
            if (numbered := f"decoder.layers.{layer}.{name}") in self.checkpoint.tensors:
                return numbered, None
            if (stacked := f"decoder.layers.{name}") in self.checkpoint.tensors:
                return stacked, layer
        return f"decoder.layers.{source}", layer

    def __getitem__(self, name: str) -> Tensor:
        key, row, rule, index = self._origin[name]
        if self._recent is None or self._recent[0] != (key, row):
            self._recent = (key, row), rule.convert(self.checkpoint.read(key, row))
        tensor = self._recent[1][index]
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{key}: infinite or NaN values; the run has diverged")
        if name.endswith("input_quantizer.clip_high") and not tensor.any():
            raise ConfigError(
                f"{key}: 0, so not measured yet: the run ended before its first quantized "
                f"iteration ({W4A4.spelled('start_iteration')})"
            )
        converted = tensor.to(self.dtype or tensor.dtype)
        if not torch.isfinite(converted).all():
            raise ConfigError(f"{key}: too large for {self.dtype}; use --dtype keep or fp32")
        return converted.contiguous()

    def meta(self, name: str) -> Tensor:
        """A tensor without data, of the shape and dtype that ``self[name]`` would have."""
        key, row, rule, index = self._origin[name]
        shape = self.checkpoint.tensors[key][0 if row is None else 1 :]
        empty = torch.empty(shape, dtype=self.checkpoint.dtype(key), device="meta")
        return rule.convert(empty)[index].to(self.dtype or empty.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._origin)

    def __len__(self) -> int:
        return len(self._origin)
