"""The decoder of ``torch_plugins.hf`` in vLLM's layers: Ladder Residual and Cross-Layer Attention.

A consumer of Cross-Layer Attention attends to the cache of its producer and has none of its own
(``kv_sharing_target_layer_name``), so vLLM's cache holds ``num_layers / num_producers`` times the
tokens. The all-reduces of a ladder are vLLM's own, which wait: the function is the ladder's, the
overlap is not.

Shapes: T tokens of all sequences, D hidden size.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.activation import get_act_and_mul_fn, get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from ..config import ConfigError
from ..hf import PluginDecoderConfig
from ..ladder_residual import Streams, apply_layer, initial_streams
from .refusals import check

STACKED: dict[str, dict[str, Any]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "kv_proj": {"k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
"""Linears that hold several of the checkpoint's: their names there, and vLLM's shard ids."""


def build_norm(config: PluginDecoderConfig, size: int | None = None) -> nn.Module:
    size = size or config.hidden_size
    if config.normalization == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


def build_rope(config: PluginDecoderConfig) -> nn.Module | None:
    if config.position_embedding_type != "rope":
        return None
    parameters = dict(config.rope_parameters)
    if "factor" in parameters:
        parameters["factor"] = float(parameters["factor"])  # vLLM takes an integer for a list
    limit = config.max_position_embeddings
    return get_rope(config.head_dim, max_position=limit, rope_parameters=parameters)


class PluginDecoderAttention(nn.Module):
    """Grouped-query attention of a producer (with keys and values) or a consumer (without)."""

    def __init__(
        self, config: PluginDecoderConfig, vllm_config: VllmConfig, layers: str, index: int
    ) -> None:
        super().__init__()
        names = [f"{layers}.{i}.self_attn" for i in range(config.num_hidden_layers)]
        producer, prefix = config.kv_producers[index], names[index]
        tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
        heads, self.head_dim = config.num_attention_heads, config.head_dim
        local_heads = heads // tensor_parallel
        local_kv_heads = max(1, config.num_key_value_heads // tensor_parallel)
        self.sizes = [local_heads * self.head_dim, *[local_kv_heads * self.head_dim] * 2]
        self.is_producer = producer == index
        self.kv_norm = None
        shape = (config.hidden_size, config.head_dim)
        bias, kv_heads = config.attention_bias, config.num_key_value_heads
        if self.is_producer and not config.separate_kv_norm:
            self.qkv_proj = QKVParallelLinear(
                *shape, heads, kv_heads, bias=bias, prefix=f"{prefix}.qkv_proj"
            )
        else:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size, heads * config.head_dim, bias=bias, prefix=f"{prefix}.q_proj"
            )
        if self.is_producer and config.separate_kv_norm:
            self.kv_norm = build_norm(config)
            self.kv_proj = QKVParallelLinear(
                *shape, 0, kv_heads, bias=bias, prefix=f"{prefix}.kv_proj"
            )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = None
        if config.qk_norm and self.is_producer:
            self.k_norm = build_norm(config, config.head_dim)
        self.rotary_emb = build_rope(config)
        self.attn = Attention(
            local_heads,
            config.head_dim,
            config.attention_multiplier,
            num_kv_heads=local_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=None if self.is_producer else f"{names[producer]}.attn",
        )

    def _project(self, x_TD: Tensor, stream_TD: Tensor) -> tuple[Any, ...]:
        """Queries, and the keys and values of a producer."""
        if not self.is_producer:
            return self.q_proj(x_TD)[0], None, None
        if self.kv_norm is None:
            return self.qkv_proj(x_TD)[0].split(self.sizes, dim=-1)
        key_value = self.kv_proj(self.kv_norm(stream_TD))[0]
        return self.q_proj(x_TD)[0], *key_value.split(self.sizes[1:], dim=-1)

    def _normalize(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Each head by itself."""
        if norm is None:
            return x
        return norm(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)

    def forward(self, positions: Tensor, x_TD: Tensor, stream_TD: Tensor) -> Tensor:
        """``x_TD`` is the normed stream; a separate norm of keys and values reads the stream."""
        query, key, value = self._project(x_TD, stream_TD)
        query, key = self._normalize(query, self.q_norm), self._normalize(key, self.k_norm)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]


class PluginDecoderMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` when not gated."""

    def __init__(self, config: PluginDecoderConfig, prefix: str) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.mlp_gated
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                width, [inner] * 2, bias=bias, prefix=f"{prefix}.gate_up_proj"
            )
            self.act_fn = get_act_and_mul_fn(config.hidden_act)
        else:
            self.up_proj = ColumnParallelLinear(width, inner, bias=bias, prefix=f"{prefix}.up_proj")
            self.act_fn = get_act_fn(config.hidden_act)
        self.down_proj = RowParallelLinear(inner, width, bias=bias, prefix=f"{prefix}.down_proj")

    def forward(self, x_TD: Tensor) -> Tensor:
        up = (self.gate_up_proj if self.gated else self.up_proj)(x_TD)[0]
        return self.down_proj(self.act_fn(up))[0]


class PluginDecoderLayer(nn.Module):
    """Attention and MLP around the residual stream, standard or ladder."""

    def __init__(self, config: PluginDecoderConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        layers, index = prefix.rsplit(".", 1)
        self.self_attn = PluginDecoderAttention(config, vllm_config, layers, int(index))
        self.mlp = PluginDecoderMLP(config, f"{prefix}.mlp")
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.residual_multiplier = config.residual_multiplier
        self.ladder = int(index) in config.ladder_layers

    def forward(self, positions: Tensor, streams: Streams) -> Streams:
        def attention(x: Tensor) -> Tensor:
            return self.self_attn(positions, self.input_layernorm(x), x) * self.residual_multiplier

        def mlp(x: Tensor) -> Tensor:
            return self.mlp(self.post_attention_layernorm(x)) * self.residual_multiplier

        return apply_layer(streams, attention, mlp, self.ladder)


def _compiles(vllm_config: VllmConfig) -> bool:
    """All but a ladder on CPU, which the inductor of torch 2.13 makes another function.

    Its C++ backend forgets, when it fuses loops, that a buffer was written in place: there a sum of
    the ladder joins a loop that runs before the matrix product it adds. torch 2.14 remembers.
    """
    ladder = vllm_config.model_config.hf_config.ladder_layers
    inductor = vllm_config.compilation_config.backend == "inductor"
    return not (ladder and inductor and current_platform.is_cpu())


@support_torch_compile(enable_if=_compiles)
class PluginDecoderModel(nn.Module):
    """Embedding, layers and final norm; a pipeline stage has some of them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, stage = config, get_pp_group()
        width = config.hidden_size
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, width)
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions: nn.Module = PPMissingLayer()
            if stage.is_first_rank:
                self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: PluginDecoderLayer(config, vllm_config, prefix),
            prefix=maybe_prefix(prefix, "layers"),
        )
        self.norm = build_norm(config) if stage.is_last_rank else PPMissingLayer()
        self.streams = ("hidden_states", "attention_states")[: 2 if config.ladder_layers else 1]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            list(self.streams), width
        )

    def _embed(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        if self.config.position_embedding_type == "learned_absolute":
            inputs_embeds = inputs_embeds + self.embed_positions(positions)
        return inputs_embeds * self.config.embedding_multiplier

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            streams = initial_streams(self._embed(inputs_embeds, positions))
        else:
            assert intermediate_tensors is not None
            tensors = [intermediate_tensors[name] for name in self.streams]
            streams = Streams(tensors[0], tensors[-1])
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            streams = layer(positions, streams)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors(dict(zip(self.streams, streams, strict=False)))
        return self.norm(streams.hidden_states)


class PluginDecoderForCausalLM(nn.Module, SupportsPP):
    """The decoder with its language-model head, as vLLM builds it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        self.config, stages = config, parallel.pipeline_parallel_size
        layers = config.num_hidden_layers
        check(
            config,
            tensor_parallel=parallel.tensor_parallel_size,
            stage_starts=[get_pp_indices(layers, stage, stages)[0] for stage in range(stages)],
            quantization=vllm_config.model_config.quantization,
            fast_prefill=vllm_config.cache_config.kv_sharing_fast_prefill,
        )
        self.model = PluginDecoderModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            tied = config.tie_word_embeddings
            self.lm_head = head.tie_weights(self.model.embed_tokens) if tied else head
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=1 / config.logits_scaling)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the checkpoint's tensors; the names of the parameters they went to.

        Raises:
            ConfigError: a tensor is not of this model, or one is missing.
        """
        places = self._places()
        missing = set(places)
        for name, weight in weights:
            if is_pp_missing_parameter(name, self):
                continue
            if self.config.tie_word_embeddings and name == "lm_head.weight":
                continue
            if name not in places:
                raise ConfigError(f"the checkpoint has {name}, which this configuration has not")
            parameter, shard = places[name]
            load = getattr(self.get_parameter(parameter), "weight_loader", default_weight_loader)
            load(self.get_parameter(parameter), weight, *shard)
            missing.discard(name)
        if missing:
            raise ConfigError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        return {parameter for parameter, _ in places.values()}

    def _places(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """For every tensor of the checkpoint: the parameter that holds it, and the shard there."""
        places: dict[str, tuple[str, tuple[Any, ...]]] = {}
        for parameter, _ in self.named_parameters():
            *path, module, kind = parameter.split(".")
            for part, shard in STACKED.get(module, {module: None}).items():
                name = ".".join([*path, part, kind])
                places[name] = (parameter, () if shard is None else (shard,))
        return places
