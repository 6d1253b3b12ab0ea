"""Wrappers that stay cheap until they are needed: the rest of the package is imported only then."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

MODEL_TYPE = "plugin_decoder"
W4A4_METHOD = "torch_plugins_w4a4"


def knows_model_type(original: Callable[..., Any], mapping: Any, model_type: Any) -> Any:
    """Wrap of ``model_type in CONFIG_MAPPING``, which the Auto classes ask before they load."""
    if model_type == MODEL_TYPE and not original(mapping, model_type):
        with contextlib.suppress(ImportError):  # a transformers too old for it: as if not installed
            importlib.import_module("torch_plugins.hf")
    return original(mapping, model_type)


def reads_quantization(original: Callable[..., Any], section: Any) -> Any:
    """Wrap of what transformers asks of a ``quantization_config``: W4A4's marker is registered, and
    goes on without the keys that stop a transformers without us."""
    if isinstance(section, dict) and section.get("quant_method") == W4A4_METHOD:
        importlib.import_module("torch_plugins.hf.w4a4")
        tripwire = importlib.import_module("torch_plugins.w4a4.marker").TRIPWIRE
        section = {key: value for key, value in section.items() if key not in tripwire}
    return original(section)
