"""When a plugin decoder is nothing but a stock model of transformers, say which."""

from __future__ import annotations

from typing import Any

from transformers import GraniteConfig, LlamaConfig

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
"""Fields with one name and one meaning in all three configurations."""


def stock_config(config: PluginDecoderConfig) -> LlamaConfig | GraniteConfig | None:
    """The ``llama`` or ``granite`` configuration with the same function and tensor names.

    Returns:
        Llama where all multipliers are neutral, Granite where they are not, None where a plugin
        feature is active or neither can express the shape: LayerNorm, an ungated MLP, positions
        other than full RoPE, a norm of queries and keys, a bias on only some of q, k, v and o, or
        heads that do not divide the width.
    """
    if not _expressible(config):
        return None
    fields: dict[str, Any] = {name: getattr(config, name) for name in SHARED}
    fields["rms_norm_eps"] = config.norm_eps
    fields["rope_parameters"] = dict(config.rope_parameters)
    multipliers = {
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
    }
    neutral = all(value == 1 for value in multipliers.values())
    if neutral and config.attention_multiplier == config.head_dim**-0.5:
        return LlamaConfig(**fields)
    return GraniteConfig(**fields, **multipliers, attention_multiplier=config.attention_multiplier)


def _expressible(config: PluginDecoderConfig) -> bool:
    return (
        not config.ladder_layers
        and "reuse" not in config.kv_sharing_modes
        and not config.separate_kv_norm
        and not config.qk_norm
        and config.normalization == "rmsnorm"
        and config.mlp_gated
        and config.position_embedding_type == "rope"
        and config.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0
        and config.attention_output_bias == config.attention_bias
        and config.hidden_size % config.num_attention_heads == 0
    )
