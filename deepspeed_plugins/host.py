"""Wraps of DeepSpeed's configuration and engine: check the JSON, and say what became active."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from deepspeed_plugins import auxiliary_loss, dense_moe, w4a4
from deepspeed_plugins.conversion import convert_model
from deepspeed_plugins.features import adapter, available, features_of
from deepspeed_plugins.seams.requirements import require


def read_config(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap of ``DeepSpeedConfig.__init__``: refuses what is wrong with the plugins' settings.

    Raises:
        ConfigError: see :func:`deepspeed_plugins.features.features_of`.
    """
    original(config, *args, **kwargs)
    features_of(config._param_dict)
    auxiliary_loss.check_accumulation(config)


def build_engine(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap of ``DeepSpeedEngine.__init__``: rank 0 prints one line per active feature,
    and one for auxiliary losses.

    Raises:
        ConfigError: a feature cannot work, before anything is built; or it is on and inactive.
    """
    call = inspect.signature(original).bind(engine, *args, **kwargs)
    features = features_of(call.arguments["config_class"]._param_dict)
    for key in features:
        require(key, available()[key].name)
        of_model = getattr(adapter(key), "of_model", None)
        if of_model is not None:
            features[key] = of_model(features[key], call.arguments)
    _tell("validate", features, call.arguments)
    dense_moe.check(features, call.arguments)
    w4a4.check(features, call.arguments)
    convert_model(features, call.arguments)
    _tell("convert", features, call.arguments)
    auxiliary_loss.check(call.arguments)
    dense_moe.gather_together(call.arguments)
    original(*call.args, **call.kwargs)
    _tell("finish", features, engine)
    report(features, engine)
    line = auxiliary_loss.take(engine)
    if line is not None:
        print_rank_0(line)


def _tell(moment: str, features: Mapping[str, Any], subject: Any) -> None:
    """Call the function ``moment`` of each feature's adapter, where it has one."""
    for key, settings in features.items():
        function = getattr(adapter(key), moment, None)
        if function is not None:
            function(settings, subject)


def report(features: Mapping[str, Any], engine: Any) -> None:
    """Print what each feature says of itself."""
    names = {key: available()[key].name for key in features}
    for key in features:
        print_rank_0(f"{names[key]}: {adapter(key).describe(features[key], engine)}")


def print_rank_0(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)
