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


def of_model(settings: DenseMoE, engine_arguments: Mapping[str, Any]) -> DenseMoE:
    """``gated`` as the model's MLP is, where the JSON does not say."""
    section = engine_arguments["config_class"]._param_dict[conversion.SECTION]
    if "gated" in section[settings.key()]:
        return settings
    config = getattr(engine_arguments["model"], "config", None)
    return replace(settings, gated=bool(getattr(config, "mlp_gated", True)))


def validate(settings: DenseMoE, engine_arguments: Mapping[str, Any]) -> None:
    """Refuse tensor parallelism.

    Raises:
        ConfigError: names the key and the remedy.
    """
    size = engine_arguments["config_class"].tensor_parallel_config.autotp_size
    if size > 1:
        raise ConfigError(
            f"{conversion.SECTION}.{settings.key()} with tensor_parallel.autotp_size {size}: it "
            "would cut the matrices of experts and not their scores; drop tensor_parallel and use "
            "ZeRO"
        )


def prepare(settings: DenseMoE, engine_arguments: Mapping[str, Any]) -> None:
    """Under ZeRO 3, let it gather the weights of a layer's experts together."""
    if engine_arguments["config_class"].zero_optimization_stage < 3:
        return
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_modules

    from torch_plugins.hf.experts import PluginDecoderDenseMoE, PluginDecoderDenseMoEAttention

    kinds = [PluginDecoderDenseMoE, PluginDecoderDenseMoEAttention]
    set_z3_leaf_modules(engine_arguments["model"], kinds, raise_if_not_found=False)


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
