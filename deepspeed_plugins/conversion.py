"""Features of the model from DeepSpeed's JSON: the engine's model becomes the decoder before ZeRO
partitions it::

    "deepspeed_plugins": {
      "ladder_residual": {"layers": "all"},
      "cross_layer_attention": {"sharing_factor": 2},
      "kv_init": "first",
      "dense_moe": {"num_experts": 8},
      "expert_init": "blocks",
      "apply_to": "trained"
    }

``apply_to``: ``trained`` leaves engines without an optimizer as they are, such as the reference
models of preference tuning, which are given the same JSON; ``all`` converts every engine's model.
``kv_init``: a layer that projects keys and values for others starts with its own projections, or
with the ``mean`` over the layers that share them. ``expert_init``: experts are the ``blocks`` of
the dense model, whose function is the same then, or start ``fresh`` like those of a new model.

The model of the script is converted in place, whether its weights are whole or partitioned by
``zero.Init``; see :mod:`torch_plugins.hf.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from deepspeed_plugins.features import APPLY_TO, EXPERT_INIT, KV_INIT, SECTION, available, choice
from deepspeed_plugins.parameters import follow
from deepspeed_plugins.seams import versions
from torch_plugins.config import ConfigError, Feature

if TYPE_CHECKING:
    from torch_plugins.hf.convert import Storage


def convert_model(features: Mapping[str, Any], engine_arguments: dict[str, Any]) -> None:
    """Convert the model of an engine that is about to be built, if a feature asks for it.

    Args:
        features: settings by key, as ``features_of`` gives them.
        engine_arguments: of ``DeepSpeedEngine.__init__``; optimizer and parameters are made to
            follow.

    Raises:
        ConfigError: the model or a section of the JSON does not go with a feature; nothing was
            changed then.
    """
    wanted = of_decoder(features)
    config = engine_arguments["config_class"]
    if not wanted or not applies(config, engine_arguments.get("optimizer")):
        return
    model = engine_arguments["model"]
    check(wanted, config, model)
    from torch_plugins.hf.convert import convert

    kv_init, expert_init = (choice(config._param_dict, key) for key in (KV_INIT, EXPERT_INIT))
    result = convert(model, wanted.values(), kv_init, _zero_storage(), expert_init)
    follow(result, engine_arguments)
    if result.added:
        import deepspeed

        deepspeed.set_optimizer_flags(config, model)  # Muon wants a flag on every parameter


def of_decoder(features: Mapping[str, Any]) -> dict[str, Feature]:
    """The features that the decoder computes."""
    known = available()
    return {key: settings for key, settings in features.items() if known[key].has_section}


def applies(config: Any, optimizer: Any) -> bool:
    """Whether an engine with this ``DeepSpeedConfig`` and the script's optimizer is converted."""
    trained = bool(optimizer) or bool(config.optimizer_name)
    return trained or choice(config._param_dict, APPLY_TO) == "all"


def layers_of(model: Any) -> int | None:
    """Layers of a model of transformers; None of another."""
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def check(features: Mapping[str, Feature], config: Any, model: Any) -> None:
    """Refuse what the converted model does not go with.

    Raises:
        ConfigError: names the feature, the key of the JSON and the remedy.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    names = " and ".join(f"{SECTION}.{key}" for key in features)
    if isinstance(model, PipelineModule):
        raise ConfigError(
            f"{names}: a PipelineModule is cut into stages and cannot be converted; use ZeRO"
        )
    check_tensor_parallel(names, config.tensor_parallel_config, model)


def check_tensor_parallel(names: str, settings: Any, model: Any) -> None:
    """Refuse what AutoTP could not do with the converted model, which it shards by the decoder's
    own plan.

    Raises:
        ConfigError: names the key of the JSON and the remedy.
    """
    size = settings.autotp_size
    if size <= 1:
        return
    told = f"{names} with tensor_parallel.autotp_size {size}"
    version = versions.installed()
    if version is not None and version < versions.AUTOTP_OLDEST:
        raise ConfigError(
            f"{told}: this deepspeed {versions.text(version)} was not tested with it; install "
            f"{versions.text(versions.AUTOTP_OLDEST)}, or drop tensor_parallel and use ZeRO"
        )
    for key in ("preset_model", "partition_config"):
        value = getattr(settings, key)
        if value is not None:
            raise ConfigError(
                f"{told}: tensor_parallel.{key} {value!r} is in the way of the decoder's own plan, "
                f"which knows the parameters that are added; drop {key}"
            )
    if hasattr(model, "peft_config"):
        raise ConfigError(
            f"{told}: AutoTP would leave the weights under PEFT's adapters whole; drop "
            "tensor_parallel and use ZeRO"
        )
    heads = getattr(getattr(model, "config", None), "num_key_value_heads", size)
    if size > heads:
        raise ConfigError(
            f"{told}: the model has {heads} key-value heads, and a rank would have none; use "
            f"autotp_size {heads} at most"
        )


def describe(settings: Feature, engine: Any, active: Callable[[int], str]) -> str:
    """``active(number of layers)`` if the engine's model computes the feature.

    Raises:
        ConfigError: it does not, though it should.
    """
    if not applies(engine._config, engine.client_optimizer):
        return f'left alone, an engine without an optimizer ("{APPLY_TO}": "trained")'
    config = engine.module.config
    section, layers = getattr(config, settings.key(), None), config.num_hidden_layers
    found = None if section is None else type(settings).from_dict(section).function(layers)
    if found != settings.function(layers):
        raise ConfigError(
            f"{SECTION}.{settings.key()} is on, but the engine's {type(engine.module).__name__} "
            f"has {section}; run python -m deepspeed_plugins.doctor"
        )
    return active(layers)


def _zero_storage() -> Storage:
    from deepspeed import zero

    from torch_plugins.hf.convert import Storage

    return Storage(
        shape=lambda parameter: getattr(parameter, "ds_shape", parameter.shape),
        gather=lambda parameters: zero.GatheredParameters(parameters, modifier_rank=0),
    )
