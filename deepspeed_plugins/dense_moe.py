"""DS-MoE from DeepSpeed's JSON (arXiv 2404.05567)::

    "deepspeed_plugins": {
      "dense_moe": {"num_experts": 8, "attention_experts": 4},
      "expert_init": "blocks"
    }

Without ``gated`` the experts are gated where the model's MLP is. The losses of the routers are
auxiliary losses, see :mod:`deepspeed_plugins.auxiliary_loss`. ZeRO 3 is told to gather the weights
of a layer's experts together: with some of the experts, evaluation reads them without calling the
projections that ZeRO would gather them for, and on every rank others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepspeed_plugins import conversion
from torch_plugins.config import ConfigError, DenseMoE

TOGETHER = ("PluginDecoderDenseMoE", "PluginDecoderDenseMoEAttention")
"""Modules that hold experts."""


def of_model(settings: DenseMoE, engine_arguments: Mapping[str, Any]) -> DenseMoE:
    """``gated`` as the model's MLP is, where the JSON does not say."""
    section = engine_arguments["config_class"]._param_dict[conversion.SECTION]
    if "gated" in section[settings.key()]:
        return settings
    config = getattr(engine_arguments["model"], "config", None)
    return replace(settings, gated=bool(getattr(config, "mlp_gated", True)))


def check(features: Mapping[str, Any], engine_arguments: Mapping[str, Any]) -> None:
    """Refuse tensor parallelism of a model that has experts, or is to be given them.

    Raises:
        ConfigError: names the key and the remedy.
    """
    config, key = engine_arguments["config_class"], DenseMoE.key()
    size = config.tensor_parallel_config.autotp_size
    asked = key in features and conversion.applies(config, engine_arguments.get("optimizer"))
    if size > 1 and (asked or _has_experts(engine_arguments["model"])):
        raise ConfigError(
            f"{key} with tensor_parallel.autotp_size {size}: it would cut the matrices of experts "
            "and not their scores; drop tensor_parallel and use ZeRO"
        )


def gather_together(engine_arguments: Mapping[str, Any]) -> None:
    """Under ZeRO 3, let it gather the weights of a layer's experts together; also of a model that
    had them before, be it of this package or of a folder's remote code."""
    config, model = engine_arguments["config_class"], engine_arguments["model"]
    if config.zero_optimization_stage < 3 or not _has_experts(model):
        return
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_modules

    set_z3_leaf_modules(model, list(TOGETHER), raise_if_not_found=False)


def _has_experts(model: Any) -> bool:
    return getattr(getattr(model, "config", None), DenseMoE.key(), None) is not None


def describe(settings: DenseMoE, engine: Any) -> str:
    """``"8 experts, 4 attention experts in 4 layers, mlp routers; evaluation top-k, dense"``.

    Raises:
        ConfigError: the engine's model has other experts.
    """

    def active(layers: int) -> str:
        kinds = (
            (settings.num_experts, "experts"),
            (settings.attention_experts, "attention experts"),
        )
        counts = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
        rules = {"experts": settings.inference, "attention experts": settings.attention_inference}
        evaluated = ", ".join(rules[kind] for count, kind in kinds if count)
        return f"{counts} in {layers} layers, {settings.router} routers; evaluation {evaluated}"

    return conversion.describe(settings, engine, active)
