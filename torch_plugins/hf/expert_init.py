"""Experts of DS-MoE in a dense model: routers to add, and how the weights start.

N experts are consecutive blocks of the MLP, A attention experts the query heads of each key-value
head. With ``blocks`` they keep the model's weights. The routers' last matrices start at 0, so that
all scores are ``1 / N``, and ``down_proj`` is multiplied by N (``o_proj`` by A): the function is
the dense model's, to the rounding of the products; to the bit where N and A are powers of 2. With
``fresh`` the experts start at random like a new model's, and the routers too.

arXiv 2404.05567 trains from scratch and says nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import ConfigError, DenseMoE
from .configuration_plugin_decoder import PluginDecoderConfig
from .router import PluginDecoderRouter

if TYPE_CHECKING:
    from .convert import Parameters, Storage

EXPERT_INITS = ("blocks", "fresh")

PROJECTIONS = {"mlp": ("gate_proj", "up_proj", "down_proj"), "attention": ("q_proj", "o_proj")}
"""Of an expert, by kind; the last is multiplied."""


def check(config: PluginDecoderConfig, before: DenseMoE | None) -> None:
    """Refuse experts that the model cannot be given, which ``config`` asks for.

    Args:
        before: the experts that it has.

    Raises:
        ConfigError: names field, value and remedy.
    """
    if config.dense_moe is None:
        return
    feature: DenseMoE = DenseMoE.from_dict(config.dense_moe)
    key = feature.key()

    def refuse(name: str, why: str) -> None:
        raise ConfigError(f"{key}.{name} {getattr(feature, name)!r}: {why}")

    if feature.num_experts:
        if config.mlp_bias:
            refuse("num_experts", "the model's MLP has biases (mlp_bias), and experts have none")
        if feature.gated != config.mlp_gated:
            refuse("gated", f"the model's MLP says {config.mlp_gated} (mlp_gated); set that")
        if config.intermediate_size % feature.num_experts:
            width = config.intermediate_size
            refuse("num_experts", f"must divide the model's intermediate_size {width}")
    groups = config.num_attention_heads // config.num_key_value_heads
    if feature.attention_experts:
        if config.attention_output_bias:
            why = "o_proj has a bias (attention_bias), which attention experts have not"
            refuse("attention_experts", why)
        if groups == 1:
            refuse("attention_experts", "a key-value head of the model has one query head; use 0")
        if feature.attention_experts != groups:
            refuse("attention_experts", f"a key-value head has {groups} query heads; use {groups}")
    asked = config.experts
    if before is not None and asked is not None:
        layers = config.num_hidden_layers
        if before.function(layers) != asked.function(layers):
            raise ConfigError(
                f"the model has {key} {before.to_dict()} and cannot be given {config.dense_moe}: "
                "convert the model that it was made from"
            )


def start(model: nn.Module, config: PluginDecoderConfig, init: str, storage: Storage) -> Parameters:
    """Give new routers their memory and the experts their first weights; returns what each of the
    routers' parameters is to be treated like: the matrix that reads the same input."""
    likes = {}
    for prefix, module in model.named_modules():
        router = getattr(module, "router", None)
        if not isinstance(router, PluginDecoderRouter) or not router.weight.is_meta:
            continue
        like = module.up_proj.weight if router.kind == "mlp" else module.q_proj.weight
        router.train(module.training)
        for name, parameter in list(router.named_parameters()):
            first = torch.zeros if init == "blocks" and name == "weight" else torch.randn
            whole = first(parameter.shape, dtype=like.dtype, device=like.device)
            whole = whole.mul_(config.initializer_range)
            owner, _, own = name.rpartition(".")
            setattr(router.get_submodule(owner), own, nn.Parameter(whole, like.requires_grad))
            likes[f"{prefix}.router.{name}"] = like
        _start_projections(module, router, config.initializer_range, init, storage)
    return likes


@torch.no_grad()
def _start_projections(
    module: Any, router: PluginDecoderRouter, deviation: float, init: str, storage: Storage
) -> None:
    experts = router.weight.shape[0]
    own = [getattr(module, name, None) for name in PROJECTIONS[router.kind]]
    projections = [projection for projection in own if projection is not None]
    for projection in projections if init == "fresh" else projections[-1:]:
        parameters = list(projection.parameters())
        with storage.gather(parameters):
            if init == "blocks":
                projection.weight.mul_(experts)
                continue
            projection.weight.normal_(0.0, deviation)
            if projection.bias is not None:
                projection.bias.zero_()


def settle(model: nn.Module, feature: DenseMoE) -> None:
    """Give the routers of a decoder the losses and the choice of experts of ``feature``."""
    for module in model.modules():
        if isinstance(module, PluginDecoderRouter):
            module.settle(feature)
