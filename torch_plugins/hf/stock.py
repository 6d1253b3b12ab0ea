"""When a plugin decoder is nothing but a stock model of transformers, say which."""

from __future__ import annotations

from typing import Any

from transformers import GraniteConfig, LlamaConfig, Qwen2MoeConfig, Qwen3MoeConfig

from ..config import DenseMoE
from ..w4a4.marker import SECTION
from .configuration_plugin_decoder import PluginDecoderConfig

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "head_dim",
    "dtype",
)
"""Fields with one name and one meaning in ``llama`` and ``granite``."""

OF_EXPERTS = tuple(
    name for name in SHARED if name not in ("attention_bias", "mlp_bias", "head_dim")
)
"""Those that ``qwen2_moe`` and ``qwen3_moe`` have too."""

SHARED_WIDTH = 64
"""Of the expert of a ``qwen2_moe`` that every token computes, here all zeros. transformers would do
with 0; vLLM reads no tensors without elements, and divides the width by the processes."""


def stock_config(
    config: PluginDecoderConfig,
) -> LlamaConfig | GraniteConfig | Qwen2MoeConfig | Qwen3MoeConfig | None:
    """The configuration of a stock model with the same function.

    Returns:
        Llama where all multipliers are neutral, Granite where they are not, both with the decoder's
        tensor names. With DS-MoE a ``qwen2_moe``, or a ``qwen3_moe`` where queries and keys are
        normalized: their tensors are those of ``torch_plugins.export.experts``. None where another
        plugin feature is active or no stock model can express the shape: LayerNorm, an ungated MLP,
        positions other than full RoPE, a norm of queries and keys without experts, a bias on only
        some of q, k, v and o, or heads that do not divide the width; attention experts, MLP routers
        and thresholds.
    """
    if not _expressible(config):
        return None
    experts = config.experts
    if experts is not None:
        return _mixture(config, experts)
    if config.qk_norm or config.attention_output_bias != config.attention_bias:
        return None
    if config.hidden_size % config.num_attention_heads:
        return None
    fields = _fields(config, SHARED)
    multipliers = {
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
    }
    if _is_neutral(config):
        return LlamaConfig(**fields)
    return GraniteConfig(**fields, **multipliers, attention_multiplier=config.attention_multiplier)


def _fields(config: PluginDecoderConfig, names: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(config, name) for name in names}
    fields["rms_norm_eps"] = config.norm_eps
    fields["rope_parameters"] = dict(config.rope_parameters)
    quantization = getattr(config, SECTION, None)
    return fields if quantization is None else fields | {SECTION: quantization}


def _is_neutral(config: PluginDecoderConfig) -> bool:
    """Whether no multiplier differs from those of Llama."""
    ones = config.embedding_multiplier, config.residual_multiplier, config.logits_scaling
    return ones == (1, 1, 1) and config.attention_multiplier == config.head_dim**-0.5


def _mixture(
    config: PluginDecoderConfig, feature: DenseMoE
) -> Qwen2MoeConfig | Qwen3MoeConfig | None:
    """DS-MoE as a mixture of SwiGLU experts that does not normalize the scores it keeps."""
    kept = feature.kept()
    top_k, threshold = (feature.num_experts, None) if kept is None else kept
    if (
        feature.attention_experts
        or feature.router != "linear"
        or threshold is not None
        or config.hidden_act != "silu"
        or not _is_neutral(config)
    ):
        return None
    fields = _fields(config, OF_EXPERTS) | {
        "num_experts": feature.num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": config.intermediate_size // (feature.num_experts or 1),
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.0,
    }
    if config.qk_norm:
        if config.attention_output_bias != config.attention_bias:
            return None
        bias = config.attention_bias
        return Qwen3MoeConfig(**fields, attention_bias=bias, head_dim=config.head_dim)
    if config.attention_output_bias or config.hidden_size != (
        config.num_attention_heads * config.head_dim
    ):
        return None
    return Qwen2MoeConfig(
        **fields,
        qkv_bias=config.attention_bias,
        shared_expert_intermediate_size=SHARED_WIDTH,
    )


def _expressible(config: PluginDecoderConfig) -> bool:
    """What all stock models here ask for."""
    return (
        not config.ladder_layers
        and config.desync is None
        and "reuse" not in config.kv_sharing_modes
        and not config.separate_kv_norm
        and config.normalization == "rmsnorm"
        and config.mlp_gated
        and config.position_embedding_type == "rope"
        and config.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0
    )
