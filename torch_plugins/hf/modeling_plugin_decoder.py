"""The decoder: Llama and Granite conventions, with every plugin feature as an option.

Shapes: B batch, S tokens, D hidden size. Without features its state dict is, name for name, that of
the ``llama`` and ``granite`` models of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..config import ConfigError
from .attention import PluginDecoderAttention, PluginDecoderRotaryEmbedding
from .configuration_plugin_decoder import PluginDecoderConfig
from .desync import build_rank_norm, divide
from .experts import PluginDecoderDenseMoE, PluginDecoderDenseMoEAttention, set_experts
from .mlp import PluginDecoderMLP
from .norm import build_norm
from .parallel import check, overlap
from .router import PluginDecoderRouter

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
"""What the running transformers calls the key-value cache: 5.24 renamed it. Both are accepted."""

State = tuple[Tensor | None, ...]
"""Between layers: hidden states, attention states of a ladder, keys and values of a group, and an
output of an MLP that is still to be added."""


class PluginDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP around the residual stream, standard or ladder, producer or consumer.

    A ladder's modules read the stream one module early (arXiv 2501.06589, section 3), and their
    outputs are added one module late: under tensor parallelism an output may be in flight until
    then (:mod:`~torch_plugins.hf.parallel`).
    """

    hands_over = False
    """Whether the next layer adds the MLP's output; only where that is a ladder layer."""

    def __init__(self, config: PluginDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        experts = config.experts
        moe_attention = experts is not None and bool(experts.attention_experts)
        attention = PluginDecoderDenseMoEAttention if moe_attention else PluginDecoderAttention
        moe_mlp = experts is not None and bool(experts.num_experts)
        self.self_attn = attention(config, layer_idx)
        self.mlp = (PluginDecoderDenseMoE if moe_mlp else PluginDecoderMLP)(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.residual_multiplier = config.residual_multiplier
        self.ladder = layer_idx in config.ladder_layers
        producers = config.kv_producers
        self.shares_kv = producers.count(producers[layer_idx]) > 1

    def forward(
        self,
        hidden_states: Tensor,
        attention_states: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        pending: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | State:
        """One layer.

        Args:
            hidden_states, attention_states: the stream after the MLP of the layer before, and after
                its attention; the second only in a model with ladder layers.
            key, value: of the sharing group, passed on by every layer in it.
            pending: the MLP's output of the layer before, ``[B, S, D]``, where that is not in
                ``hidden_states`` yet, which then are the stream after its attention.

        Tensors with a gradient are positional, and outputs where later layers read them: reentrant
        checkpointing asks for it. Returns the hidden states alone where there is nothing else.
        """
        has_ladder = attention_states is not None or pending is not None
        early = hidden_states
        if self.ladder and attention_states is not None:
            early = attention_states
        normed = self.input_layernorm(early)
        attended, _, key, value = self.self_attn(normed, early, key, value, **kwargs)
        if pending is not None:
            hidden_states = self._add(hidden_states, pending)
        if self.ladder:
            out = self.mlp(self.post_attention_layernorm(hidden_states))
            attention_states = self._add(hidden_states, attended, self.self_attn)
        else:
            attention_states = self._add(hidden_states, attended, self.self_attn)
            out = self.mlp(self.post_attention_layernorm(attention_states))
        shared = (key, value) if self.shares_kv else (None, None)
        if self.hands_over and not self._watched():
            return attention_states, None, *shared, out
        hidden_states = self._add(attention_states, out, self.mlp)
        if not has_ladder and not self.shares_kv:
            return hidden_states
        return hidden_states, attention_states if has_ladder else None, *shared

    def _add(self, stream: Tensor, out: Tensor, module: nn.Module | None = None) -> Tensor:
        """``stream`` with the output of ``module``; None: of the MLP of the layer before."""
        return stream + out * self.residual_multiplier

    def _watched(self) -> bool:
        """Whether a hook may read the hidden states that the layer returns."""
        return bool(self._forward_hooks)


class PluginDecoderDesyncLayer(PluginDecoderLayer):
    """Attention and MLP of a model with Desync Residual, in a region of its pattern or not.

    The stream is ``[T, B, S, D]`` within a region, one for each rank, and ``[B, S, D]`` elsewhere.
    """

    def __init__(self, config: PluginDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        desync = config.desync
        assert desync is not None
        assert desync.ranks is not None
        places = desync.places(config.num_hidden_layers)
        self.places = places[2 * layer_idx], places[2 * layer_idx + 1]
        norms = ("input_layernorm", "post_attention_layernorm")
        for place, module, norm in zip(self.places, (self.self_attn, self.mlp), norms, strict=True):
            if place.inside:
                divide(module, desync.ranks)
                setattr(self, norm, build_rank_norm(config, desync.ranks))

    def forward(
        self,
        hidden_states: Tensor,
        attention_states: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        pending: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stream before the layer to stream after it; nothing else goes from layer to layer."""
        attention, mlp = self.places
        normed = self.input_layernorm(hidden_states)
        out, *_ = self.self_attn(normed, hidden_states, **kwargs)
        hidden_states = self._after(hidden_states, out, attention.leaves)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return self._after(hidden_states, out, mlp.leaves)

    def _after(self, stream: Tensor, out: Tensor, leaves: bool) -> Tensor:
        """Each stream with its rank's addend; ``leaves``: one stream, all addends on their mean."""
        if leaves:
            stream, out = stream.mean(0), out.sum(0)
        return self._add(stream, out)


class PluginDecoderPreTrainedModel(PreTrainedModel):
    config_class = PluginDecoderConfig
    config: PluginDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PluginDecoderLayer", "PluginDecoderDesyncLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PluginDecoderLayer,
        "attentions": PluginDecoderAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PluginDecoderRouter):
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    def _resolve_parallel_plans(self, distributed_config: Any) -> tuple[dict[str, str], ...]:
        """Transformers' plans by name of a module, with what a ladder overlaps."""
        check(self.config, distributed_config.tp_size)
        plan, *others = super()._resolve_parallel_plans(distributed_config)
        return overlap(self, plan), *others

    def set_experts(self, **choice: Any) -> None:
        """Choose the experts that evaluation and generation compute from now on; training computes
        all::

            model.set_experts(inference="top-k", top_k=4)
            model.set_experts(inference="threshold", threshold=0.48)
            model.set_experts(inference="dense", attention_inference="dense")

        A field left out stays, but a ``top_k`` goes with its rule. ``threshold-top-k`` takes K from
        all tokens of a forward pass, so that with it a token's logits depend on the rest of the
        batch, and a prompt's on how it is divided.

        Args:
            choice: ``inference``, ``top_k``, ``threshold``, ``attention_inference`` and
                ``attention_top_k``, as in ``config.dense_moe``, which has them afterwards.

        Raises:
            ConfigError: the model has no experts, or a value is wrong; nothing is changed then.
        """
        set_experts(self, self.config, choice)


class PluginDecoderModel(PluginDecoderPreTrainedModel):
    """Embedding, layers and final norm; returns the last hidden states ``[B, S, D]``."""

    def __init__(self, config: PluginDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        layer = PluginDecoderLayer if config.desync is None else PluginDecoderDesyncLayer
        self.layers = nn.ModuleList(
            layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = build_norm(config)
        if config.position_embedding_type == "rope":
            self.rotary_emb = PluginDecoderRotaryEmbedding(config)
        self.has_ladder = bool(config.ladder_layers)
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        if self.config.position_embedding_type == "learned_absolute":
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        return inputs_embeds * self.config.embedding_multiplier

    def _check_pipeline(self) -> None:
        """Refuse a pipeline stage (absent layers are ``nn.Identity``) that would be wrong."""
        staged = any(isinstance(layer, nn.Identity) for layer in self.layers)
        if staged and self.config.base_model_pp_plan is None:
            raise ConfigError(
                "pipeline parallelism cannot run this model (ladder_residual, desync_residual, "
                "cross_layer_attention, embedding_multiplier or learned_absolute positions); "
                "use tensor parallelism, or device_map"
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        self._check_pipeline()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + past).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        rope = self.config.position_embedding_type == "rope"
        kwargs |= {
            "attention_mask": causal_mask,
            "position_ids": position_ids,
            CACHE: cache,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids) if rope else None,
        }
        embedding = self._embed(inputs_embeds, position_ids)
        state: State = (embedding, embedding if self.has_ladder else None)
        for layer in self.layers:
            out = layer(*state, **kwargs)
            state = out if isinstance(out, tuple) else (out,)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(state[0]), **{CACHE: cache})


class PluginDecoderForCausalLM(PluginDecoderPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head: logits ``[B, S, vocab]``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: PluginDecoderConfig) -> None:
        super().__init__(config)
        self.model = PluginDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if not config.base_model_tp_plan:
            self._tp_plan = {}  # else the head alone would be divided

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """``logits_to_keep``: the last N positions (0: all), or their indices."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep]) / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
