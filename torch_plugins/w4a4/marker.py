"""The mark of a Hugging Face folder whose linear layers have W4A4's clips.

In ``config.json``::

    "quantization_config": {
      "quant_method": "torch_plugins_w4a4",
      "feature": {"activation_bits": 4, ...},
      "modules": ["model.layers.0.mlp.down_proj", ...],
      "load_in_4bit": "...", "bnb_4bit_compute_dtype": "..."
    }

transformers without this package only warns of a ``quant_method`` that it does not know, and goes
on with plain linear layers: another function of the same weights. The last two keys stop it: they
send it to a method that refuses their values, with them in its message. vLLM refuses the method by
its name. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from ..feature import ConfigError, did_you_mean
from ..w4a4_config import W4A4

QUANT_METHOD = "torch_plugins_w4a4"
SECTION = "quantization_config"
REMEDY = "W4A4 of torch_plugins: import torch_plugins.hf before loading"
TRIPWIRE = {"load_in_4bit": REMEDY, "bnb_4bit_compute_dtype": REMEDY}
KEYS = ("quant_method", "feature", "modules")


def marker(feature: W4A4, modules: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of a model whose linear layers ``modules`` have W4A4."""
    own = {"quant_method": QUANT_METHOD, "feature": feature.to_dict(), "modules": sorted(modules)}
    return own | TRIPWIRE


def is_marker(section: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a ``quantization_config`` is one."""
    return isinstance(section, Mapping) and section.get("quant_method") == QUANT_METHOD


def read(section: Mapping[str, Any]) -> tuple[W4A4, list[str]]:
    """The feature and the names of the linear layers.

    Raises:
        ConfigError: an unknown key, a wrong value, or no layers.
    """
    for key in section:
        if key not in (*KEYS, *TRIPWIRE):
            raise ConfigError(f"{SECTION}: unknown key {key!r}{did_you_mean(key, list(KEYS))}")
    fields, modules = section.get("feature"), section.get("modules")
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{SECTION}.feature {fields!r}: must be an object, the fields of W4A4")
    good = isinstance(modules, list) and modules and all(isinstance(name, str) for name in modules)
    if not good:
        raise ConfigError(
            f"{SECTION}.modules {modules!r}: must be a list, the names of the linear layers"
        )
    return W4A4.from_dict(dict(fields)), list(modules or ())


def mark(model: Any, feature: W4A4, modules: Iterable[str]) -> None:
    """Let a model of transformers write the marker into its ``config.json``; leave any other.

    Raises:
        ConfigError: the model is quantized in another way.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return
    present = getattr(config, SECTION, None)
    if present is not None and not is_marker(present):
        raise ConfigError(
            f"{W4A4.key()}: the model has a {SECTION} of another method, {present}; load its "
            "weights without it"
        )
    setattr(config, SECTION, marker(feature, modules))
