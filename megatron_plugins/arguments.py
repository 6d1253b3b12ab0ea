"""The plugins' flags in Megatron's parser, and what follows from them.

``add_flags``, ``validate`` and ``attach`` wrap upstream functions (see ``seams/ledger.py``). Without
a plugin flag they add nothing but the flags' defaults to the namespace.
"""

from __future__ import annotations

import dataclasses
import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from megatron_plugins.refusals import refuse
from megatron_plugins.seams import patch
from torch_plugins.config import FEATURES, ConfigError, did_you_mean

_TYPES: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}

CPU_FLAG = "--cpu-backend"


def add_flags(
    original: Callable[..., ArgumentParser], parser: ArgumentParser, *args: Any, **kwargs: Any
) -> ArgumentParser:
    """Wrap of ``add_megatron_arguments``: one group per feature, with its title and paper."""
    parser = original(parser, *args, **kwargs)
    for feature in FEATURES:
        group = parser.add_argument_group(
            f"{feature.title} (plugin)", f"https://arxiv.org/abs/{feature.paper}"
        )
        group.add_argument(feature.flag(), action="store_true", help=f"Turn {feature.title} on.")
        for field in dataclasses.fields(feature):
            # None until given, so that a field flag without its enabling flag can be told.
            group.add_argument(
                feature.flag(field.name),
                type=_TYPES[str(field.type)],
                metavar=field.metadata["metavar"],
                help=f"{field.metadata['help']} Default: {field.default}.",
            )
    group = parser.add_argument_group("CPU backend (plugin)")
    group.add_argument(
        CPU_FLAG,
        action="store_true",
        help="Run on the CPU over gloo, for tests and small models. Also MEGATRON_PLUGINS_CPU=1.",
    )
    parser.parse_known_args = _checked(parser, parser.parse_known_args)  # type: ignore[method-assign]
    return parser


def _checked(parser: ArgumentParser, parse_known_args: Callable[..., Any]) -> Callable[..., Any]:
    """Check what was typed right after the parser read it; every way of parsing passes here."""

    def checked(*args: Any, **kwargs: Any) -> tuple[Namespace, list[str]]:
        namespace, unknown = parse_known_args(*args, **kwargs)
        check_unknown(unknown)
        check_typed(namespace)
        return namespace, unknown

    return checked


def own_flags() -> list[str]:
    """Every flag of ours."""
    flags = [CPU_FLAG]
    for feature in FEATURES:
        flags.append(feature.flag())
        flags.extend(feature.flag(field.name) for field in dataclasses.fields(feature))
    return flags


def check_unknown(unknown: Sequence[str]) -> None:
    """Raise for a word the parser did not know that was meant for us.

    Raises:
        ConfigError: an unknown flag with a feature's prefix.
    """
    prefixes = tuple(f"--{feature.prefix}-" for feature in FEATURES)
    for word in unknown:
        flag = word.partition("=")[0]
        if flag.startswith(prefixes):
            raise ConfigError(f"unknown flag {flag}{did_you_mean(flag, own_flags())}")


def check_typed(args: Namespace) -> None:
    """Fill in field defaults, and reject what can only be a mistake.

    Raises:
        ConfigError: a field's flag without the feature's own, or any of our flags with --yaml-cfg,
            for which Megatron throws the command line away.
    """
    typed = [CPU_FLAG] if args.cpu_backend else []
    for feature in FEATURES:
        on = getattr(args, feature.key())
        typed += [feature.flag()] if on else []
        for field in dataclasses.fields(feature):
            value = getattr(args, feature.dest(field.name))
            if value is not None and not on:
                raise ConfigError(
                    f"{feature.flag(field.name)} {value} does nothing without {feature.flag()}: "
                    f"add {feature.flag()}, or drop {feature.flag(field.name)}"
                )
            if on and value is None:
                setattr(args, feature.dest(field.name), field.default)
    if typed and getattr(args, "yaml_cfg", None) is not None:
        raise ConfigError(
            f"{', '.join(typed)} with --yaml-cfg {args.yaml_cfg}: with a YAML file Megatron ignores "
            "the command line, the flag would be lost; give Megatron's options as flags"
        )


def features_of(args: Namespace) -> dict[str, Any]:
    """Active features of a namespace, which may come from a checkpoint: key -> configuration."""
    active: dict[str, Any] = {}
    for feature in FEATURES:
        if getattr(args, feature.key(), False):
            names = [field.name for field in dataclasses.fields(feature)]
            given = {name: getattr(args, feature.dest(name), None) for name in names}
            active[feature.key()] = feature(**{k: v for k, v in given.items() if v is not None})
    return active


def adapter(key: str) -> ModuleType:
    """The module of a feature in this package; same file name as everywhere."""
    return importlib.import_module(f"megatron_plugins.{key}")


def validate(original: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Wrap of ``validate_args``: upstream's checks, then each active feature's.

    Raises:
        ConfigError: a refused combination, a feature without any layer, or a missing hook.
    """
    result = original(args, *rest, **kwargs)
    for key, feature in features_of(args).items():
        patch.require(key, feature.flag())
        refuse(args, feature.flag(), adapter(key).REFUSED)
        if not feature.resolve(args.num_layers):
            raise ConfigError(
                f"{feature.flag()} with {feature.flag('layers')} {feature.layers}: no layer of "
                f"{args.num_layers} would use it; name some, or drop {feature.flag()}"
            )
        adapter(key).validate(args, feature)
    return result


def attach(original: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Wrap of ``core_transformer_config_from_args``: ``config.megatron_plugins`` = active features.

    The attribute is absent when none is active.
    """
    config = original(args, *rest, **kwargs)
    features = features_of(args)
    if features:
        config.megatron_plugins = features
        for key, feature in features.items():
            adapter(key).adjust_config(config, feature)
    return config
