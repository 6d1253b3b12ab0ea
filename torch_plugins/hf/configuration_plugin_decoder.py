"""Configuration of the decoder: Llama and Granite conventions, and one field per plugin feature."""

from __future__ import annotations

import os
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig

from ..config import (
    FEATURES,
    ConfigError,
    CrossLayerAttention,
    DenseMoE,
    DesyncResidual,
    LadderResidual,
    did_you_mean,
)
from .remote_code import AUTO_MAP, write_remote_code

NORMALIZATIONS = ("rmsnorm", "layernorm")
POSITION_EMBEDDINGS = ("rope", "learned_absolute", "none")


class PluginDecoderConfig(PretrainedConfig):
    """A pre-norm causal decoder.

    With ``x`` the residual stream and ``m`` the ``residual_multiplier``, a layer without features
    is ``x = x + m * attn(norm(x)); x = x + m * mlp(norm(x))``, and
    ``logits = lm_head(norm(x)) / logits_scaling``.

    Args:
        num_key_value_heads: key and value heads; default: as many as query heads.
        head_dim: default ``hidden_size / num_attention_heads``.
        mlp_gated: True: ``down(act(gate(x)) * up(x))`` (SwiGLU with ``hidden_act="silu"``);
            False: ``down(act(up(x)))``.
        hidden_act: a name of ``transformers.activations.ACT2FN``.
        normalization: ``rmsnorm`` or ``layernorm``.
        norm_bias: bias of LayerNorm; RMSNorm has none.
        attention_bias: bias of the q, k and v projections.
        attention_output_bias: bias of the output projection; default: ``attention_bias``.
        qk_norm: normalize each query and key head before RoPE, with weights of ``head_dim``.
        mlp_bias: bias of every MLP projection.
        position_embedding_type: ``rope``, ``learned_absolute`` (a table of
            ``max_position_embeddings`` rows added to the token embedding) or ``none``.
        rope_parameters: ``{"rope_type", "rope_theta", "partial_rotary_factor", ...}``, as
            transformers defines them; ignored without rope.
        embedding_multiplier: scales the sum of token and position embedding.
        attention_multiplier: scales query-key products; default ``head_dim ** -0.5``.
        residual_multiplier: scales every module before it is added to the stream.
        logits_scaling: divides the logits.
        ladder_residual: ``{"layers": SPEC}`` or None; see ``torch_plugins.config.LadderResidual``.
        desync_residual: ``{"pattern": "2x", "ranks": T}`` or None: the function of T
            tensor-parallel ranks; see ``torch_plugins.desync_config.DesyncResidual``. Norms of
            modules in a region have weights ``[T * hidden_size]``.
        cross_layer_attention: ``{"sharing_factor": N}`` or ``{"pattern": "0,0,2,2"}``, with
            ``"kv_norm"``, or None; see ``torch_plugins.config.CrossLayerAttention``. Gemma 3n's
            ``num_kv_shared_layers`` is the nearest standing field, but its sharing layers are the
            last ones, all behind one producer.
        dense_moe: ``{"num_experts": N, "attention_experts": A, ...}`` or None; see
            ``torch_plugins.dense_moe_config.DenseMoE``. ``intermediate_size`` is the width of all N
            experts together, and ``num_attention_heads`` is ``A * num_key_value_heads``.

    Raises:
        ConfigError: a value or key is not one of those above.
    """

    model_type = "plugin_decoder"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        mlp_gated: bool = True,
        normalization: str = "rmsnorm",
        norm_eps: float = 1e-6,
        norm_bias: bool = True,
        attention_bias: bool = False,
        attention_output_bias: bool | None = None,
        qk_norm: bool = False,
        mlp_bias: bool = False,
        attention_dropout: float = 0.0,
        position_embedding_type: str = "rope",
        max_position_embeddings: int = 2048,
        rope_parameters: dict[str, Any] | None = None,
        embedding_multiplier: float = 1.0,
        attention_multiplier: float | None = None,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        ladder_residual: dict[str, Any] | None = None,
        desync_residual: dict[str, Any] | None = None,
        cross_layer_attention: dict[str, Any] | None = None,
        dense_moe: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.mlp_gated = mlp_gated
        self.normalization = normalization
        self.norm_eps = norm_eps
        self.norm_bias = norm_bias
        self.attention_bias = attention_bias
        self.attention_output_bias = (
            attention_bias if attention_output_bias is None else attention_output_bias
        )
        self.qk_norm = qk_norm
        self.mlp_bias = mlp_bias
        self.attention_dropout = attention_dropout
        self.position_embedding_type = position_embedding_type
        self.max_position_embeddings = max_position_embeddings
        if position_embedding_type == "rope":
            self.rope_parameters = dict(rope_parameters or {})
        self.embedding_multiplier = embedding_multiplier
        self.attention_multiplier = (
            self.head_dim**-0.5 if attention_multiplier is None else attention_multiplier
        )
        self.residual_multiplier = residual_multiplier
        self.logits_scaling = logits_scaling
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.ladder_residual = ladder_residual
        self.desync_residual = desync_residual
        self.cross_layer_attention = cross_layer_attention
        self.dense_moe = dense_moe
        if head_dim is None and hidden_size % num_attention_heads:
            raise ConfigError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                f"{num_attention_heads}: set head_dim"
            )
        self._check_shape()
        self._check_features(kwargs)
        super().__init__(**kwargs)
        # Set after the base class, which resets the fields it knows to their defaults.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    def _check_shape(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ConfigError(f"normalization {self.normalization!r}: use one of {NORMALIZATIONS}")
        if self.position_embedding_type not in POSITION_EMBEDDINGS:
            raise ConfigError(
                f"position_embedding_type {self.position_embedding_type!r}: "
                f"use one of {POSITION_EMBEDDINGS}"
            )
        if self.hidden_act not in ACT2FN:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r}{did_you_mean(self.hidden_act, list(ACT2FN))}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads {self.num_key_value_heads}: "
                f"must divide num_attention_heads {self.num_attention_heads}"
            )
        rotary_factor = getattr(self, "rope_parameters", {}).get("partial_rotary_factor", 1.0)
        if self.position_embedding_type == "rope" and int(self.head_dim * rotary_factor) % 2:
            raise ConfigError(
                f"partial_rotary_factor {rotary_factor} of head_dim {self.head_dim}: "
                "RoPE turns pairs, so their product must be even"
            )

    def _check_features(self, unknown: dict[str, Any]) -> None:
        """Reject a wrong or misspelt section, which transformers would keep in silence."""
        sections = [feature for feature in FEATURES if feature.has_section]
        keys = [feature.key() for feature in sections]
        for key in unknown:
            suggestion = did_you_mean(key, keys)
            if "did you mean" in suggestion:
                raise ConfigError(f"unknown config field {key!r}{suggestion}")
        for feature in sections:
            section = getattr(self, feature.key(), None)
            if section is not None and not isinstance(section, dict):
                raise ConfigError(
                    f"{feature.key()} {section!r}: use a dict of its options, or null"
                )
        _ = self.ladder_layers, self.kv_producers, self.experts, self.desync

    @property
    def ladder_layers(self) -> tuple[int, ...]:
        """Zero-based indices of the ladder layers; empty without the feature."""
        if self.ladder_residual is None:
            return ()
        return LadderResidual.from_dict(self.ladder_residual).resolve(self.num_hidden_layers)

    @property
    def desync(self) -> DesyncResidual | None:
        """Desync Residual, checked against the shape; None without the feature."""
        if self.desync_residual is None:
            return None
        feature: DesyncResidual = DesyncResidual.from_dict(self.desync_residual)
        check_ranks(self, feature)
        return feature

    @property
    def kv_producers(self) -> tuple[int, ...]:
        """For every layer, the layer whose keys and values it attends to; itself if a producer.

        A consumer has no ``k_proj`` and ``v_proj`` (nor ``k_norm``), only ``q_proj`` and
        ``o_proj``.
        """
        if self.cross_layer_attention is None:
            return tuple(range(self.num_hidden_layers))
        feature = CrossLayerAttention.from_dict(self.cross_layer_attention)
        return feature.resolve(self.num_hidden_layers)

    @property
    def separate_kv_norm(self) -> bool:
        """Whether a producer's keys and values read ``self_attn.kv_norm(x)``, x the stream that
        ``input_layernorm`` reads."""
        section = self.cross_layer_attention
        return section is not None and CrossLayerAttention.from_dict(section).kv_norm == "separate"

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """What transformers' caches ask of a configuration: ``reuse`` layers store nothing.

        Before transformers 5.23 they do not ask. A consumer's entry then stays empty all the same,
        but offloaded, cropped (assisted decoding) and early-initialized caches fail or fill it.
        """
        producers = self.kv_producers
        return [None if layer == producer else "reuse" for layer, producer in enumerate(producers)]

    @property
    def experts(self) -> DenseMoE | None:
        """DS-MoE, checked against the shape; None without the feature."""
        if self.dense_moe is None:
            return None
        feature: DenseMoE = DenseMoE.from_dict(self.dense_moe)
        check_experts(self, feature)
        return feature

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallelism: column-parallel into each module, row-parallel out of it. Empty for
        experts, where scores and matrices would have to be divided alike, and for ranks of Desync
        Residual, which one process computes: transformers refuses."""
        if self.dense_moe is not None or self.desync_residual is not None:
            return {}
        columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]
        columns += ["mlp.gate_proj"] if self.mlp_gated else []
        plan = {f"layers.*.{name}": "colwise" for name in columns}
        if self.qk_norm:  # on local heads, with one weight for all heads
            norms = {f"layers.*.self_attn.{n}_norm": "replicated_with_grad_allreduce" for n in "qk"}
            plan |= norms
        return plan | {f"layers.*.{n}": "rowwise" for n in ("self_attn.o_proj", "mlp.down_proj")}

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """Pipeline parallelism, or None where it would be wrong.

        A stage hands the next one a single tensor, as if it were an embedding: the two streams of
        ladder layers, those of ranks and shared keys and values do not fit, and an embedding
        multiplier or position table would act twice.
        """
        if (
            self.ladder_layers
            or self.desync_residual is not None
            or "reuse" in self.kv_sharing_modes
            or self.embedding_multiplier != 1
            or self.position_embedding_type == "learned_absolute"
        ):
            return None
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save, with the modelling code beside it for ``trust_remote_code``."""
        self.auto_map = dict(AUTO_MAP)
        if self._auto_class is None:  # else loaded as remote code, which transformers copies itself
            write_remote_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)


def check_ranks(config: PluginDecoderConfig, feature: DesyncResidual) -> None:
    """Refuse ranks that cannot divide the decoder, or that another feature does not know.

    Raises:
        ConfigError: names field, value and remedy.
    """
    feature.resolve(config.num_hidden_layers)
    if feature.ranks is None:
        raise ConfigError(
            "desync_residual.ranks: missing; the function depends on the number of "
            "tensor-parallel ranks that the model was trained with"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % feature.ranks:
            raise ConfigError(
                f"desync_residual.ranks {feature.ranks}: must divide {name} {getattr(config, name)}"
            )
    for name in ("attention_output_bias", "mlp_bias"):
        if getattr(config, name):
            raise ConfigError(
                f"{name} True: with desync_residual each rank would add it to its own stream; set "
                "false"
            )
    for other in (LadderResidual, CrossLayerAttention, DenseMoE):
        if getattr(config, other.key()) is not None:
            raise ConfigError(f"{other.key()} with desync_residual: drop one of them")


def check_experts(config: PluginDecoderConfig, feature: DenseMoE) -> None:
    """Refuse experts that do not fit the decoder.

    Raises:
        ConfigError: names field, value and remedy.
    """

    def require(holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"{name} {getattr(config, name)!r}: {remedy}")

    if experts := feature.num_experts:
        width, rest = divmod(config.intermediate_size, experts)
        require(
            not rest,
            "intermediate_size",
            f"the width of all experts together, must be a multiple of dense_moe.num_experts "
            f"{experts}",
        )
        require(
            feature.ffn_hidden_size in (None, width),
            "intermediate_size",
            f"dense_moe has {experts} experts of ffn_hidden_size {feature.ffn_hidden_size}: set "
            f"intermediate_size {experts * (feature.ffn_hidden_size or 0)}, or leave "
            "ffn_hidden_size out",
        )
        require(
            feature.gated == config.mlp_gated,
            "mlp_gated",
            f"dense_moe.gated is {feature.gated}; set both alike",
        )
        require(not config.mlp_bias, "mlp_bias", "dense_moe experts have no biases; set false")
    if experts := feature.attention_experts:
        heads = experts * config.num_key_value_heads
        require(
            config.num_attention_heads == heads,
            "num_attention_heads",
            f"dense_moe.attention_experts {experts} of num_key_value_heads "
            f"{config.num_key_value_heads} query heads each are {heads} heads",
        )
        require(
            not config.attention_output_bias,
            "attention_output_bias",
            "the output projection of dense_moe.attention_experts has no bias; set false",
        )
