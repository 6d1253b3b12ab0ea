"""The plugins' flags in Megatron's parser, and what follows from them.

:func:`add_flags`, :func:`validate` and :func:`attach` wrap upstream functions (seams/ledger.py).
Without a plugin flag they only add the flags' defaults to the namespace.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from megatron_plugins import cpu
from megatron_plugins.features import adapter
from megatron_plugins.refusals import refuse
from megatron_plugins.seams import doors, requirements
from torch_plugins.config import FEATURES, ConfigError, Feature, did_you_mean


def integer(text: str) -> int:
    """An integer, also as ``250_000`` or ``2.5e11``."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


_TYPES: dict[str, Callable[[str], Any]] = {"str": str, "int": integer, "float": float}


def add_flags(
    original: Callable[..., ArgumentParser], parser: ArgumentParser, *args: Any, **kwargs: Any
) -> ArgumentParser:
    """Wrap of ``add_megatron_arguments``: one group per feature, with its title and paper."""
    parser = original(parser, *args, **kwargs)
    for feature in FEATURES:
        group = parser.add_argument_group(
            f"{feature.title} (plugin)", f"https://arxiv.org/abs/{feature.paper}"
        )
        turn_on = f"Turn {feature.title} on."
        if feature.switch is None:
            group.add_argument(feature.flag(), action="store_true", help=turn_on)
        else:
            _extend_choices(parser, *feature.switch, turn_on)
        for field in dataclasses.fields(feature):
            default = "" if field.default is None else f" Default: {field.default}."
            # None until typed: a field's flag without the feature's own must be told apart.
            kind = str(field.type).removesuffix(" | None")
            value: dict[str, Any] = {"action": "store_const", "const": True}
            if kind != "bool":
                value = {key: field.metadata[key] for key in ("choices", "metavar")}
                value["type"] = _TYPES[kind]
            group.add_argument(
                feature.flag(field.name),
                help=f"{field.metadata['help']}{default}".replace("%", "%%"),
                **value,
            )
    group = parser.add_argument_group("CPU backend (plugin)")
    group.add_argument(
        cpu.FLAG,
        action="store_true",
        help=f"Run on the CPU over gloo, for tests and small models; also {cpu.VARIABLE}=1.",
    )
    return _on_parser(parser)


def _extend_choices(parser: Any, option: str, value: str, help: str) -> None:
    """Let Megatron's ``option`` take one more value."""
    action = parser._option_string_actions[option]
    action.choices = [*(action.choices or ()), value]
    action.help = f"{action.help or ''} {value}: {help}".strip()


def _on_parser(parser: Any) -> ArgumentParser:
    """Check what was typed right after the parser has read it: every way of parsing passes here.

    Also keep ``--help`` alive: 0.19 and 0.20 have help texts with a bare ``%``, at which argparse
    gives up.
    """
    parse_known_args, format_help = parser.parse_known_args, parser.format_help

    def checked(
        words: Sequence[str] | None = None, namespace: Namespace | None = None, **kwargs: Any
    ) -> tuple[Namespace, list[str]]:
        words = sys.argv[1:] if words is None else words
        namespace, unknown = parse_known_args(words, namespace, **kwargs)
        check_unknown(unknown)
        check_typed(namespace)
        adjust(namespace, typed_names(parser, words))
        return namespace, unknown

    def repaired() -> str:
        for action in parser._actions:
            try:
                _ = (action.help or "") % vars(action)
            except (KeyError, TypeError, ValueError):
                action.help = action.help.replace("%", "%%")
        return format_help()

    parser.parse_known_args, parser.format_help = checked, repaired
    return parser


def typed_names(parser: Any, words: Sequence[str]) -> set[str]:
    """Names of the arguments that a command line gives, whatever their values."""
    actions = parser._option_string_actions
    flags = (word.partition("=")[0] for word in words)
    return {actions[flag].dest for flag in flags if flag in actions}


def adjust(args: Namespace, typed: set[str]) -> None:
    """Let active features set Megatron's own arguments, those apart that were ``typed``."""
    for key, feature in features_of(args).items():
        adjust_args = getattr(adapter(key), "adjust_args", None)
        if adjust_args is not None:
            adjust_args(args, feature, typed)


def own_flags() -> list[str]:
    """Every flag of the plugins."""
    flags = [cpu.FLAG]
    for feature in FEATURES:
        flags.extend([feature.flag()] if feature.switch is None else [])
        flags.extend(feature.flag(field.name) for field in dataclasses.fields(feature))
    return flags


def check_unknown(unknown: Sequence[str]) -> None:
    """Raise for a word that the parser did not know and that was meant for us.

    Raises:
        ConfigError: an unknown flag with a feature's prefix, or nearly one of ours.
    """
    prefixes = tuple(f"--{feature.prefix}-" for feature in FEATURES)
    for word in unknown:
        flag = word.partition("=")[0]
        nearly = difflib.get_close_matches(flag, own_flags(), n=1, cutoff=0.85)
        if flag.startswith(prefixes) or nearly:
            raise ConfigError(f"unknown flag {flag}{did_you_mean(flag, own_flags())}")


def check_typed(args: Namespace) -> None:
    """Fill in the fields' defaults, and reject what can only be a mistake.

    Raises:
        ConfigError: a field's flag without the feature's own; any flag of ours with --yaml-cfg, for
            which Megatron throws the command line away; a CPU backend that could not start.
    """
    typed = [cpu.FLAG] if args.cpu_backend else []
    for feature in FEATURES:
        names = [field.name for field in dataclasses.fields(feature)]
        given = {name: getattr(args, feature.dest(name)) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        if feature.implied and given:
            setattr(args, feature.key(), True)
        on = is_on(args, feature)
        typed += [feature.flag()] if on else []
        for name, value in given.items():
            if not on:
                raise ConfigError(
                    f"{feature.flag(name)} {value} does nothing without {feature.flag()}: "
                    f"add {feature.flag()}, or drop {feature.flag(name)}"
                )
        if on:
            set_features(args, {feature.key(): feature(**given)})
    if typed and getattr(args, "yaml_cfg", None) is not None:
        raise ConfigError(
            f"{', '.join(typed)} with --yaml-cfg {args.yaml_cfg}: Megatron ignores the command "
            "line when it reads a YAML file; give its options as flags instead"
        )
    doors.check_cpu(args.cpu_backend)


def is_on(args: Namespace, feature: type[Feature]) -> bool:
    """Whether a namespace turns ``feature`` on."""
    if feature.switch is None:
        return bool(getattr(args, feature.key(), False))
    option, value = feature.switch
    return getattr(args, _dest(option), None) == value


def _dest(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def features_of(args: Namespace) -> dict[str, Any]:
    """Active features of a namespace, which may come from a checkpoint: key -> configuration."""
    active: dict[str, Any] = {}
    for feature in FEATURES:
        if is_on(args, feature):
            names = [field.name for field in dataclasses.fields(feature)]
            given = {name: getattr(args, feature.dest(name), None) for name in names}
            active[feature.key()] = feature(**{k: v for k, v in given.items() if v is not None})
    return active


def set_features(args: Namespace, features: dict[str, Any]) -> None:
    """Turn ``features`` on in a namespace, as if they had been typed."""
    for key, feature in features.items():
        if feature.switch is None:
            setattr(args, key, True)
        else:
            setattr(args, _dest(feature.switch[0]), feature.switch[1])
        for name, value in feature.to_dict().items():
            setattr(args, feature.dest(name), value)


def adopt(features: dict[str, Any]) -> None:
    """Treat ``features`` that a spec switched on as if they had been typed: they are checked, and
    saved in checkpoints with the other arguments. Without Megatron's arguments there is nothing to
    do.

    Raises:
        ConfigError: as :func:`validate`.
    """
    args = doors.megatron_args()
    if args is not None:
        check_features(args, features)
        set_features(args, features)


def validate(original: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Wrap of ``validate_args``: upstream's checks, then each active feature's.

    Raises:
        ConfigError: a refused combination, a feature without any layer, or a missing hook.
    """
    if cpu.installed():
        cpu.adjust_args(args)
    result = original(args, *rest, **kwargs)
    check_features(args, features_of(args))
    return result


def check_features(args: Namespace, features: dict[str, Any]) -> None:
    """What every active feature demands of validated arguments, before anything is built."""
    for key, feature in features.items():
        requirements.require(key, feature.flag())
        refuse(args, feature.flag(), adapter(key).REFUSED)
        adapter(key).validate(args, feature)


def attach(original: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Wrap of ``core_transformer_config_from_args``: ``config.megatron_plugins``, a dictionary of
    the active features; absent when there is none."""
    config = original(args, *rest, **kwargs)
    features = features_of(args)
    if features:
        from megatron_plugins import hybrid

        config.megatron_plugins = features
        config.megatron_plugins_pattern = hybrid.with_borders(args)
        for key, feature in features.items():
            adapter(key).adjust_config(config, feature)
    return config
