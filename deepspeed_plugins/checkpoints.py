"""The decoder's configuration and W4A4's mark travel in DeepSpeed's checkpoints: weights of one
function must not run as another in silence, and an export needs to know what they are weights of.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed_plugins import w4a4_checkpoints
from deepspeed_plugins.features import SECTION
from deepspeed_plugins.host import print_rank_0
from torch_plugins.config import FEATURES, ConfigError, Feature

RECORD = "plugin_decoder"
"""Key in DeepSpeed's client state, which ``ds_to_universal`` keeps; content of ``config.json``."""


def save(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``DeepSpeedEngine.save_checkpoint``: adds the configuration of a decoder, and W4A4's
    mark."""
    call = inspect.signature(original).bind(engine, *args, **kwargs)
    records = {
        RECORD: config_of(engine.module),
        w4a4_checkpoints.RECORD: w4a4_checkpoints.record_of(engine.module),
    }
    records = {key: record for key, record in records.items() if record is not None}
    if records:
        call.arguments["client_state"] = {**call.arguments.get("client_state", {}), **records}
    return original(*call.args, **call.kwargs)


def load(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``DeepSpeedEngine.load_checkpoint``: compares it, and keeps it from the script.

    Raises:
        ConfigError: see :func:`compare`, and :mod:`deepspeed_plugins.w4a4_checkpoints`.
    """
    call = inspect.signature(original).bind(engine, *args, **kwargs)
    folder = str(call.arguments["load_dir"])
    result = w4a4_checkpoints.load(original, engine, call)
    if isinstance(result[1], dict):  # else there was no checkpoint
        saved = result[1].pop(RECORD, None)
        compare(saved, engine.module, folder, bool(call.arguments.get("load_module_only")))
    return result


def compare(
    saved: Mapping[str, Any] | None, model: Any, folder: str, weights_only: bool = False
) -> None:
    """Compare the features of a checkpoint with those of the model that it was loaded into.

    A standard checkpoint may become a plugin model, with a message; so may any whose weights only
    are loaded.

    Raises:
        ConfigError: the checkpoint has a feature that the model lacks, or has with other values.
    """
    theirs, mine = functions(saved), functions(config_of(model))
    if theirs == mine:
        return
    here = _sections(config_of(model))
    told = f"checkpoint {folder} has {_sections(saved)}, this run's model {here}"
    if theirs and not weights_only:
        raise ConfigError(
            f"{told}: its weights would compute another function. Give the same in {SECTION}, or "
            "load_module_only=True to retrain them"
        )
    print_rank_0(f"{SECTION}: {told}: another function until retrained")


def config_of(model: Any) -> dict[str, Any] | None:
    """``config.json`` of a decoder, with the dtype that it is trained in; None for any other
    model."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != RECORD:
        return None
    result: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return result | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}


def functions(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the features make of a decoder's function, by key."""
    if config is None:
        return {}
    layers = config["num_hidden_layers"]
    return {
        feature.key(): feature.from_dict(section).function(layers)
        for feature, section in _active(config)
    }


def _active(config: Mapping[str, Any]) -> list[tuple[type[Feature], dict[str, Any]]]:
    sections = [(feature, config.get(feature.key())) for feature in FEATURES if feature.has_section]
    return [(feature, section) for feature, section in sections if section is not None]


def _sections(config: Mapping[str, Any] | None) -> str:
    found = {feature.key(): section for feature, section in _active(config or {})}
    return json.dumps(found) if found else "no feature"
