"""The choke point of hybrid models: every stack (``HybridStack``; 0.17: ``MambaStack``) passes here
as it is built, and active features rewrite its layers' specs.

A stack has one spec for each kind of layer, and each layer is one module: attention, MLP, MoE, or a
mixer of another kind. Features rewrite layers one by one, as those of a GPT model, with
``transform_stack(layer_specs, symbols, config, feature, first)`` of their adapters.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from megatron_plugins import features
from megatron_plugins.carry import RUNNING, Carry, Channel
from megatron_plugins.layers import ACTIVE
from torch_plugins.config import ConfigError

SLOTS = {
    "*": "attention_layer",
    "-": "mlp_layer",
    "E": "moe_layer",
    "M": "mamba_layer",
    "G": "gdn_layer",
    "D": "dsa_layer",
    "+": "mla_layer",
}
"""Where a stack's submodules keep the spec of a kind of layer, by its symbol in the pattern."""


def pattern(args: Namespace) -> str | None:
    """Symbols of the layers of a hybrid model, ``"*-*-"``, without the borders of pipeline stages
    and without prediction layers; None for another model. ``args`` are validated."""
    given = with_borders(args)
    return None if given is None else given.replace("|", "")


def with_borders(args: Namespace) -> str | None:
    """The same with borders, ``"*-|*-"``."""
    given: str | None = getattr(args, "hybrid_layer_pattern", None)
    return None if given is None else given.partition("/")[0]


def pattern_of(config: Any) -> str | None:
    """The same of a configuration, on which a run notes it; one without arguments of a run has none
    before its stack is built, and never where a stack is but one of several stages."""
    noted: str | None = getattr(config, "megatron_plugins_pattern", None)
    return noted


def _note(config: Any, symbols: Sequence[str], first: int) -> None:
    """Note the pattern of a stack that is the whole model; compare that of a stage with the noted.

    Raises:
        ConfigError: they differ.
    """
    own, noted = "".join(symbols), pattern_of(config)
    if len(own) == config.num_layers and (noted or "").replace("|", "") != own:
        config.megatron_plugins_pattern = own
    elif noted is not None and noted.replace("|", "")[first : first + len(own)] != own:
        raise ConfigError(
            f"the pattern of the configuration is {noted}, and layers {first} to "
            f"{first + len(own) - 1} of this stack are {own}: they must agree"
        )


def build_stack(original: Callable[..., None], stack: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap of a stack's ``__init__``.

    Raises:
        ConfigError: an active feature does not know hybrid models, or not this one's layers.
    """
    call = inspect.signature(original).bind(stack, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    config, symbols, first = given["config"], given["layer_type_list"], given["pp_layer_offset"]
    active = {
        key: feature
        for key, feature in config.megatron_plugins.items()
        if hasattr(features.adapter(key), "transform")
    }
    if active:
        _check(active, config, first + len(symbols), given["post_process"], given["is_mtp_layer"])
        _note(config, symbols, first)
        given["submodules"] = rewritten(given["submodules"], symbols, config, active, first)
    original(*call.args, **call.kwargs)


def _check(active: dict[str, Any], config: Any, after: int, ends: bool, prediction: bool) -> None:
    """Check a stack that ends before layer ``after``; ``ends``: and the model with it."""
    for key, feature in active.items():
        if not hasattr(features.adapter(key), "transform_stack"):
            raise ConfigError(
                f"{feature.flag()}: not for hybrid models, whose stack builds its own layers; use "
                f"a GPT model, or drop {feature.flag()}"
            )
        if prediction:
            raise ConfigError(
                f"{feature.flag()}: prediction layers of a hybrid model are not rewritten; drop "
                f"them from the pattern, or {feature.flag()}"
            )
    if after > config.num_layers or (ends and after != config.num_layers):
        raise ConfigError(
            f"num_layers of the configuration is {config.num_layers}, and the last layer of this "
            f"stack is number {after} of the pattern: they must agree"
        )


def rewritten(
    submodules: Any, symbols: Sequence[str], config: Any, active: dict[str, Any], first: int
) -> Any:
    """A stack's submodules that build the layers ``first``, ``first + 1``, ... of these kinds with
    the active features."""
    stock = [_spec(submodules, symbol) for symbol in symbols]
    layer_specs: Sequence[Any] = stock
    for key, feature in active.items():
        before, adapter = layer_specs, features.adapter(key)
        layer_specs = adapter.transform_stack(before, symbols, config, feature, first)
        ACTIVE.setdefault(key, set()).update(_changed(before, layer_specs, first))
    changed = _changed(stock, layer_specs, first)
    if not changed:
        return submodules
    channel = Channel(changed[0])
    slots: dict[str, dict[int, Any]] = {}
    for index, (symbol, spec) in enumerate(zip(symbols, layer_specs, strict=True), first):
        spec = _with_channel(spec, channel) if index in changed else spec
        slots.setdefault(SLOTS[symbol], {})[index + 1] = spec
    own = {SLOTS[symbols[index - first]] for index in changed}
    return replace(submodules, **{slot: by_number(slots[slot]) for slot in own})


def _changed(before: Sequence[Any], after: Sequence[Any], first: int) -> list[int]:
    """Indices of the layers that have another spec."""
    pairs = enumerate(zip(before, after, strict=True), first)
    return [index for index, (old, new) in pairs if new is not old]


def _spec(submodules: Any, symbol: str) -> Any:
    """The spec of a kind of layer; upstream builds an identity where a stack has none."""
    spec = getattr(submodules, SLOTS[symbol], None)
    if getattr(spec, "submodules", None) is None and getattr(spec, "__name__", "") == "IdentityOp":
        raise ConfigError(
            f"this stack's spec has no {SLOTS[symbol]}, and its pattern has a layer {symbol}: "
            "name one in the spec"
        )
    return spec


def by_number(specs: dict[int, Any]) -> Any:
    """A spec that stands for several: each layer is built from that of its number."""
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    class ByNumber:
        def __new__(cls, *args: Any, layer_number: int, **kwargs: Any) -> Any:
            return build_module(specs[layer_number], *args, layer_number=layer_number, **kwargs)

    return ModuleSpec(module=ByNumber)


def _with_channel(spec: Any, channel: Channel) -> Any:
    params = {**(spec.params or {}), "channel": channel}
    return replace(spec, module=threading_layer_class(spec.module), params=params)


@cache
def threading_layer_class(base: type) -> type:
    """A subclass of a layer of a feature that takes the carry from its stack's :class:`Channel`."""

    layer_class: Any = base

    class ThreadingLayer(layer_class):
        def __init__(self, *args: Any, channel: Channel, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.channel = channel

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Carry | None]:
            passes_on = "context" in kwargs  # full recompute, in chunks or beside them
            context = kwargs.pop("context", None)
            place = (RUNNING.get() if passes_on else None) or self.channel
            if self.layer_number - 1 == self.channel.first:  # an interrupted forward may leave one
                place.carry = self.channel.carry = None
            if context is None:  # dropped since, if there was one
                context = place.carry
            place.carry = None
            hidden_states, context = super().forward(*args, context=context, **kwargs)
            place.carry = context and replace(context, channel=self.channel)
            return hidden_states, place.carry if passes_on else None

    ThreadingLayer.__name__ = ThreadingLayer.__qualname__ = base.__name__
    return ThreadingLayer
