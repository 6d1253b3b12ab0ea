"""Presets of the paper as Granite configurations, and muP on transformers' own models."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
)

from torch_plugins.config import ConfigError, MupPreset
from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM, granite_config
from torch_plugins.mup import initialize, param_groups

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)
OWN = MupPreset(residual_multiplier=0.3, embedding_multiplier=5.0, base_width=16, init_std=0.05)
MODELS = {
    GraniteConfig: GraniteForCausalLM,
    GraniteMoeConfig: GraniteMoeForCausalLM,
    PluginDecoderConfig: PluginDecoderForCausalLM,
}


def test_powerlm_3b() -> None:
    """40 layers of width 2304 with 36 heads: m is 9."""
    config = granite_config("powerlm-3b", hidden_size=2304, num_attention_heads=36)
    assert isinstance(config, GraniteConfig)
    assert config.embedding_multiplier == 12
    assert config.residual_multiplier == 0.22
    assert config.attention_multiplier == 1 / 64
    assert config.logits_scaling == 9
    assert config.initializer_range == 0.1


def test_powermoe_and_1b_moe() -> None:
    moe = dict(config_class=GraniteMoeConfig, num_local_experts=4, num_experts_per_tok=2)
    config = granite_config("powermoe-3b", hidden_size=1536, num_attention_heads=24, **moe)
    assert (config.residual_multiplier, config.logits_scaling) == (0.22, 6)
    config = granite_config("1b-moe", hidden_size=1024, num_attention_heads=16, **moe)
    assert (config.residual_multiplier, config.logits_scaling) == (0.28, 4)


def test_a_given_multiplier_wins_and_an_unknown_preset_is_an_error() -> None:
    config = granite_config("1b", **SMALL, residual_multiplier=1.0, attention_multiplier=0.1)
    assert (config.residual_multiplier, config.attention_multiplier) == (1.0, 0.1)
    with pytest.raises(ConfigError, match="preset 'powerlm-3'; did you mean 'powerlm-3b'"):
        granite_config("powerlm-3", **SMALL)


@pytest.mark.parametrize("config_class", MODELS, ids=lambda kind: kind.__name__)
def test_models(config_class: type) -> None:
    """Rates and measured stds of every parameter, experts and router included."""
    config = granite_config(OWN, config_class, **SMALL)
    assert config.logits_scaling == 4
    model = MODELS[config_class](config)
    depth, generator = config.num_hidden_layers, torch.Generator().manual_seed(0)
    initialize(model, config.initializer_range, config.logits_scaling, depth, generator=generator)
    rates = {id(p): g["lr"] for g in param_groups(model, 1e-2, 4) for p in g["params"]}
    for name, parameter in model.named_parameters():
        hidden = parameter.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name
        assert rates[id(parameter)] == (2.5e-3 if hidden else 1e-2), name
        if parameter.dim() > 1:
            std = 0.05 / 2 if hidden else 0.05
            std /= math.sqrt(2 * 2) if "o_proj" in name or "down_proj" in name else 1
            error = 4 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=error), name
