"""Wrappers that stay cheap until they are needed: the rest of the package is imported only then."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

MODEL_TYPE = "plugin_decoder"


def knows_model_type(original: Callable[..., Any], mapping: Any, model_type: Any) -> Any:
    """Wrap of ``model_type in CONFIG_MAPPING``, which the Auto classes ask before they load."""
    if model_type == MODEL_TYPE and not original(mapping, model_type):
        with contextlib.suppress(ImportError):  # a transformers too old for it: as if not installed
            importlib.import_module("torch_plugins.hf")
    return original(mapping, model_type)
