"""The forward half of muP as the fields of a Granite configuration (arXiv 2408.13359, table 1)."""

from __future__ import annotations

from typing import Any

from transformers import GraniteConfig

from ..config import MUP_PRESETS, ConfigError, MupPreset, did_you_mean


def granite_config(
    preset: str | MupPreset, config_class: type[Any] = GraniteConfig, **fields: Any
) -> Any:
    """A configuration with the multipliers of ``preset`` for the width that ``fields`` give.

    ========================  ==============================
    ``embedding_multiplier``  m_emb
    ``residual_multiplier``   m_res
    ``attention_multiplier``  1 / d_head
    ``logits_scaling``        m = hidden_size / base_width
    ``initializer_range``     std of embedding and head
    ========================  ==============================

    transformers draws *all* weights with ``initializer_range``. Draw them as muP asks with
    :func:`torch_plugins.mup.initialize`; :func:`torch_plugins.mup.param_groups` has the rates.

    Args:
        preset: a name of ``MUP_PRESETS`` or a preset of one's own.
        config_class: ``GraniteConfig``, or one with the same fields: ``GraniteMoeConfig``,
            ``PluginDecoderConfig``.
        fields: of the configuration; a multiplier among them goes before the preset's.

    Raises:
        ConfigError: an unknown preset.
    """
    if isinstance(preset, str):
        if preset not in MUP_PRESETS:
            raise ConfigError(f"preset {preset!r}{did_you_mean(preset, list(MUP_PRESETS))}")
        preset = MUP_PRESETS[preset]
    shape = config_class(**fields)
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    multipliers = {
        "embedding_multiplier": preset.embedding_multiplier,
        "residual_multiplier": preset.residual_multiplier,
        "attention_multiplier": 1 / head_dim,
        "logits_scaling": shape.hidden_size / preset.base_width,
        "initializer_range": preset.init_std,
    }
    return config_class(**{**multipliers, **fields})
