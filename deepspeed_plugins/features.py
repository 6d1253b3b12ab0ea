"""Which features a DeepSpeed JSON turns on, and where their adapters lie.

A feature's section stands under ``"deepspeed_plugins"``, named like its key::

    "deepspeed_plugins": {"my_feature": {"field": "value"}}

W4A4's may stand under ``"compression_training"`` instead, which a DeepSpeed without the plugins
refuses (0.19.7 and later) in place of ignoring it.

An adapter is the module ``deepspeed_plugins/<key>.py``; that it exists makes the feature available.
It may define

- ``of_model(settings, engine_arguments)``: the settings, with what the model decides filled in;
- ``from_config(config)``: the settings, or None while off, where they do not stand in the section;
- ``validate(settings, engine_arguments)``: raise before the engine builds anything;
- ``convert(settings, engine_arguments)``: change the model, once it is the decoder where it is to
  become it, and let optimizer and parameters follow;
- ``finish(settings, engine)``: change the engine once it is built;
- ``describe(settings, engine)``: its line at the start of a run, after checking that it is active.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch_plugins.config import (
    FEATURES,
    W4A4,
    ConfigError,
    CrossLayerAttention,
    DenseMoE,
    Feature,
    did_you_mean,
)

SECTION = "deepspeed_plugins"
ALIAS = "compression_training"
"""DeepSpeed's key for what its compression library did until 0.19.6; ours for W4A4."""
APPLY_TO, KV_INIT, EXPERT_INIT = "apply_to", "kv_init", "expert_init"
CHOICES = {
    APPLY_TO: ("trained", "all"),
    KV_INIT: ("first", "mean"),
    EXPERT_INIT: ("blocks", "fresh"),
}
"""Keys beside the features: which engines are converted, and how keys and values of producers and
how experts start; the default is the first."""
GOES_WITH = {KV_INIT: CrossLayerAttention.key(), EXPERT_INIT: DenseMoE.key()}
MICRO_BATCHES = "aux_micro_batches"
"""Key beside the features: micro-batches that a script accumulates by hand, see
:mod:`deepspeed_plugins.auxiliary_loss`."""


def adapter(key: str) -> ModuleType:
    """``power_lr -> deepspeed_plugins.power_lr``, imported on first use."""
    return import_module(f"deepspeed_plugins.{key}")


def available() -> dict[str, type[Feature]]:
    """Features that have an adapter here, by key."""
    found = {feature.key(): feature for feature in FEATURES}
    return {key: found[key] for key in found if find_spec(f"deepspeed_plugins.{key}")}


def features_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the features that a parsed JSON turns on, by key.

    Raises:
        ConfigError: an unknown or misplaced key, or a wrong value.
    """
    section = config.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} {section!r}: must be an object, one key per feature")
    section = _with_alias(section, config.get(ALIAS))
    _refuse_auto(section)
    for key in CHOICES:
        choice(config, key)
    micro_batches(config)
    known = available()
    elsewhere = {key for key in known if hasattr(adapter(key), "from_config")}
    beside = [*CHOICES, MICRO_BATCHES]
    for key in section:
        if key not in beside:
            _check_key(key, [*(name for name in known if name not in elsewhere), *beside])
    if SECTION in config and not section.keys() - CHOICES.keys():
        raise ConfigError(f"{SECTION} {dict(section)}: names no feature; drop it, or add one")
    for key, feature_key in GOES_WITH.items():
        if key in section and feature_key not in section:
            raise ConfigError(f"{SECTION}.{key}: goes with {feature_key} only")
    found = {}
    for key, feature in known.items():
        if key in elsewhere:
            settings = adapter(key).from_config(config)
        else:
            settings = _read(feature, section[key]) if key in section else None
        if settings is not None:
            found[key] = settings
    return found


def is_alias(section: Any) -> bool:
    """Whether a ``compression_training`` is W4A4's and nothing else."""
    return isinstance(section, Mapping) and section.keys() == {W4A4.key()}


def pass_alias(original: Any, param_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of what DeepSpeed makes of ``compression_training``: it does not see ours."""
    if is_alias(param_dict.get(ALIAS)):
        param_dict = {key: value for key, value in param_dict.items() if key != ALIAS}
    return original(param_dict, *args, **kwargs)


def _with_alias(section: Mapping[str, Any], other: Any) -> Mapping[str, Any]:
    """The section, with what stands under :data:`ALIAS`.

    Raises:
        ConfigError: W4A4 stands in both, or together with settings of DeepSpeed's.
    """
    key = W4A4.key()
    if not isinstance(other, Mapping) or key not in other:
        return section
    if not is_alias(other):
        raise ConfigError(
            f"{ALIAS}: {key} goes alone there; drop {', '.join(sorted(other.keys() - {key}))}"
        )
    if key in section:
        raise ConfigError(f"{ALIAS}.{key} and {SECTION}.{key}: give one of them")
    return {**section, key: other[key]}


def choice(config: Mapping[str, Any], key: str) -> str:
    """The value of a key of :data:`CHOICES`.

    Raises:
        ConfigError: an unknown value.
    """
    value = config.get(SECTION, {}).get(key, CHOICES[key][0])
    if value not in CHOICES[key]:
        hint = did_you_mean(str(value), list(CHOICES[key]))
        raise ConfigError(f"{SECTION}.{key} {value!r}: unknown{hint}")
    return str(value)


def micro_batches(config: Mapping[str, Any]) -> int | None:
    """The value of :data:`MICRO_BATCHES`, or None.

    Raises:
        ConfigError: no positive integer.
    """
    value = config.get(SECTION, {}).get(MICRO_BATCHES)
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{SECTION}.{MICRO_BATCHES} {value!r}: must be a positive integer")
    return value


def _refuse_auto(section: Mapping[str, Any], at: str = SECTION) -> None:
    for key, value in section.items():
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{at}.{key}")
        elif value == "auto":
            raise ConfigError(
                f'{at}.{key} "auto": Hugging Face fills it nowhere here; give a value'
            )


def _read(feature: type[Feature], section: Any) -> Feature:
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{SECTION}.{feature.key()} {section!r}: must be an object; {{}} for the defaults"
        )
    settings: Feature = feature.from_dict(dict(section))
    return settings


def _check_key(key: str, known: list[str]) -> None:
    if key in known:
        return
    for feature in FEATURES:
        if key == feature.key():
            place = (
                f"it is turned on by {feature.where()}"
                if find_spec(f"deepspeed_plugins.{key}")
                else "this version has no DeepSpeed adapter for it"
            )
            raise ConfigError(f"{SECTION}.{key}: {place}")
    hint = did_you_mean(key, known) if known else "; this version has no feature there"
    raise ConfigError(f"{SECTION}: unknown key {key!r}{hint}")
