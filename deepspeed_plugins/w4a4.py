"""W4A4 from DeepSpeed's JSON (arXiv 2404.03605)::

    "deepspeed_plugins": {
      "w4a4": {"kurtosis_weight": 1e-5, "modules": "*", "clip_lr_mult": 1.0},
      "apply_to": "trained"
    }

or, which a DeepSpeed without this package refuses to start with,

    "compression_training": {"w4a4": {"kurtosis_weight": 1e-5}}

The linear layers of any model, of transformers or not, learn clips of their inputs, in groups of
the optimizer of their own (:mod:`deepspeed_plugins.w4a4_groups`). What the quantizers do follows
the engine's steps, and so does where clips start (:mod:`deepspeed_plugins.w4a4_steps`). Kurtosis is
an auxiliary loss, see :mod:`deepspeed_plugins.auxiliary_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepspeed_plugins import conversion, w4a4_groups, w4a4_steps
from deepspeed_plugins.features import SECTION
from torch_plugins.config import W4A4, ConfigError, DenseMoE
from torch_plugins.w4a4.linear import fake_quant_linears, swap

KEY = W4A4.key()


def validate(settings: W4A4, engine_arguments: Mapping[str, Any]) -> None:
    """Refuse what W4A4 does not go with, before anything is changed.

    Raises:
        ConfigError: names the key and the remedy.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    config, model = engine_arguments["config_class"], engine_arguments["model"]
    if not conversion.applies(config, engine_arguments.get("optimizer")):
        return
    if isinstance(model, PipelineModule):
        raise ConfigError(f"{SECTION}.{KEY}: a PipelineModule is cut into stages; use ZeRO")
    size = config.tensor_parallel_config.autotp_size
    if size > 1:
        raise ConfigError(
            f"{SECTION}.{KEY} with tensor_parallel.autotp_size {size}: AutoTP would replace the "
            "linear layers and drop their clips; drop tensor_parallel and use ZeRO"
        )
    in_json = DenseMoE.key() in config._param_dict.get(SECTION, {})
    if in_json or getattr(getattr(model, "config", None), DenseMoE.key(), None) is not None:
        raise ConfigError(
            f"{SECTION}.{KEY} with {DenseMoE.key()}: its experts are computed without their linear "
            "layers, which would leave them unquantized; use one of the two"
        )
    if config.optimizer_name == "muon" and settings.clip_lr_mult != 1 and settings.learned:
        raise ConfigError(
            f"{SECTION}.{KEY}.clip_lr_mult {settings.clip_lr_mult}: Muon makes groups of its own "
            "out of the optimizer's; use 1.0, or another optimizer"
        )


def check(features: Mapping[str, Any], engine_arguments: Mapping[str, Any]) -> None:
    """Refuse to train a model that has W4A4 where the JSON does not say so: its clips would decay
    with the weights.

    Raises:
        ConfigError: names the section to add.
    """
    config, model = engine_arguments["config_class"], engine_arguments["model"]
    trained = engine_arguments.get("optimizer") or config.optimizer_name
    if KEY in features or not trained:
        return
    for name, module in fake_quant_linears(model).items():
        raise ConfigError(
            f"the model has W4A4 ({name} has {module.feature.to_dict()}), and the JSON has no "
            f"{SECTION}.{KEY} for its clips; add it, with the same"
        )


def convert(settings: W4A4, engine_arguments: dict[str, Any]) -> None:
    """Give the linear layers of the model clips, and the clips groups of the optimizer."""
    config, model = engine_arguments["config_class"], engine_arguments["model"]
    if not conversion.applies(config, engine_arguments.get("optimizer")):
        return
    swap(model, settings)
    layers = fake_quant_linears(model)
    if not settings.learned or not (engine_arguments.get("optimizer") or config.optimizer_name):
        return
    w4a4_groups.give_clips(layers.values(), settings, engine_arguments)
    import deepspeed

    deepspeed.set_optimizer_flags(config, model)  # Muon wants a flag on every parameter


def finish(settings: W4A4, engine: Any) -> None:
    """Start the modes of the quantizers; see :mod:`deepspeed_plugins.w4a4_steps`."""
    if conversion.applies(engine._config, engine.client_optimizer):
        w4a4_steps.start(engine, settings)


def describe(settings: W4A4, engine: Any) -> str:
    """``"14 of 15 linear layers, inputs 4 bits (...), kurtosis 1e-05"``.

    Raises:
        ConfigError: none of the engine's layers has it.
    """
    if not conversion.applies(engine._config, engine.client_optimizer):
        return f'left alone, an engine without an optimizer ("{conversion.APPLY_TO}": "trained")'
    found = len(fake_quant_linears(engine.module))
    if not found:
        raise ConfigError(
            f"{SECTION}.{KEY} is on, but the engine's {type(engine.module).__name__} has no layer "
            "with it; run python -m deepspeed_plugins.doctor"
        )
    linear = sum(isinstance(module, nn.Linear) for module in engine.module.modules())
    return f"{found} of {linear} linear layers, {settings.summary()}"
