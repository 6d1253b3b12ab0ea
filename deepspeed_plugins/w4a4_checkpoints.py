"""W4A4 in DeepSpeed's checkpoints: which layers have clips, and what they are clips of.

A checkpoint without them cannot start quantization-aware training through ``load_checkpoint``: its
optimizer knows no clips. Its weights can, before the engine is built::

    state = get_fp32_state_dict_from_zero_checkpoint(folder)  # of deepspeed.utils.zero_to_fp32
    model.load_state_dict(state)
    engine, *_ = deepspeed.initialize(model=model, config=json_with_w4a4, ...)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspeed_plugins import w4a4_steps
from deepspeed_plugins.features import SECTION
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.w4a4.linear import fake_quant_linears, same_function
from torch_plugins.w4a4.marker import marker

RECORD = "plugin_w4a4"
"""Key in DeepSpeed's client state; content of ``quantization_config`` in a folder."""
KEY = W4A4.key()


def record_of(model: Any) -> dict[str, Any] | None:
    """The mark of a model with W4A4; None of any other."""
    layers = fake_quant_linears(model)
    if not layers:
        return None
    return marker(next(iter(layers.values())).feature, layers)


def load(original: Callable[..., Any], engine: Any, call: inspect.BoundArguments) -> Any:
    """Load a checkpoint and compare its mark with the model's; a model without W4A4 may take the
    weights only.

    Raises:
        ConfigError: the checkpoint has W4A4 and the model has not, or otherwise; or the model has,
            and the checkpoint, which is no start for it, has not.
    """
    folder, mine = str(call.arguments["load_dir"]), record_of(engine.module)
    weights_only = bool(call.arguments.get("load_module_only"))
    if mine is not None:
        found = peek(folder, call.arguments.get("tag"))
        if found is not None:
            compare(found[0], mine, folder)
    try:
        result = original(*call.args, **call.kwargs)
    except Exception as error:
        found = peek(folder, call.arguments.get("tag")) if mine is None else None
        if found is not None and found[0] is not None:
            compare(found[0], mine, folder, error)
        raise
    if isinstance(result[1], dict):
        saved = result[1].pop(RECORD, None)
        if mine is not None or not weights_only:
            compare(saved, mine, folder)
        w4a4_steps.loaded(engine)
    return result


def compare(
    saved: Mapping[str, Any] | None,
    mine: Mapping[str, Any] | None,
    folder: str,
    cause: Exception | None = None,
) -> None:
    """Compare the mark of a checkpoint with a model's.

    Raises:
        ConfigError: they do not compute the same.
    """
    if saved is None and mine is None:
        return
    if saved is None:
        raise ConfigError(
            f"checkpoint {folder} has no {KEY}, and this run has: its optimizer knows no clips. "
            "Load its weights into the model before deepspeed.initialize, by "
            "get_fp32_state_dict_from_zero_checkpoint of deepspeed.utils.zero_to_fp32"
        )
    if mine is None:
        raise ConfigError(
            f"checkpoint {folder} has {KEY} {saved['feature']}: its weights would compute another "
            f"function without it. Give the same in {SECTION}.{KEY}"
        ) from cause
    theirs = W4A4.from_dict(dict(saved["feature"]))
    same = same_function(theirs, W4A4.from_dict(dict(mine["feature"])))
    if not same or saved["modules"] != mine["modules"]:
        raise ConfigError(
            f"checkpoint {folder} has {KEY} {saved['feature']} in {len(saved['modules'])} layers, "
            f"this run {mine['feature']} in {len(mine['modules'])}: its weights would compute "
            f"another function. Give the same in {SECTION}.{KEY}"
        )


def peek(folder: str, tag: str | None) -> tuple[dict[str, Any] | None] | None:
    """The mark in a checkpoint, without reading its tensors; None where its files hold more than
    tensors and numbers, and are left to DeepSpeed."""
    from deepspeed_plugins.export.checkpoint import model_files, read

    try:
        return (read(model_files(Path(folder), tag)[0]).get(RECORD),)
    except ConfigError:
        return None
