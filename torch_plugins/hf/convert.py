"""Turn a loaded Llama, Mistral, Qwen2, Qwen3 or Granite model into the decoder, in place.

The families' tensor names are the decoder's, so a conversion moves no weight: every module object
and ``nn.Parameter`` of the model stays, and modules only change their class. References that a
script holds, optimizers made before, hooks, ``requires_grad``, gradient checkpointing and the
generation configuration stay valid. Without a feature the function is the same, bit for bit.

- Ladder Residual needs no other weights.
- Cross-Layer Attention drops the key and value projections of its consumers. A producer keeps its
  own (``first``), or gets the mean over its group (``mean``), weights, biases and key norms alike.
  A separate ``kv_norm`` starts as a copy of the layer's ``input_layernorm``.
- Desync Residual gives the norms of modules in its regions weights of each rank, all of them
  copies of the layer's.
- DS-MoE adds routers, and makes experts of the weights there are; see ``expert_init.py``.

The first three change the function: the model is to be trained on. So does DS-MoE with experts that
start ``fresh``; with ``blocks`` its function is the dense model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, CrossLayerAttention, DenseMoE, DesyncResidual, Feature
from ..cross_layer_attention import sharing_groups
from . import expert_init as experts
from .configuration_plugin_decoder import PluginDecoderConfig
from .desync import RankNorm
from .families import decoder_config, is_adapted
from .modeling_plugin_decoder import PluginDecoderForCausalLM, PluginDecoderLayer

KV_INITS = ("first", "mean")

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Storage:
    """How to reach weights that the host has distributed; by default none are."""

    shape: Callable[[nn.Parameter], Sequence[int]] = lambda parameter: parameter.shape
    """Of the whole parameter."""
    gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = lambda _: nullcontext()
    """A context in which the parameters are whole; what every rank writes to them alike stays."""


LOCAL = Storage()


@dataclass(frozen=True)
class Conversion:
    """What an optimizer must follow; names as in ``named_parameters``."""

    config: PluginDecoderConfig
    removed: Parameters = field(default_factory=dict)
    added: Parameters = field(default_factory=dict)
    likes: Parameters = field(default_factory=dict)
    """For each added one, the parameter that it is to be treated like: what it was copied from, or
    what reads the same input."""


def convert(
    model: Any,
    features: Iterable[Feature] = (),
    kv_init: str = KV_INITS[0],
    storage: Storage = LOCAL,
    expert_init: str = experts.EXPERT_INITS[0],
) -> Conversion:
    """Make ``model`` a :class:`PluginDecoderForCausalLM` with ``features``, in place.

    A feature replaces what the model's own configuration says of it. A decoder that computes what
    is asked for already is left alone, whatever wraps its modules meanwhile, PEFT's adapters too.

    Args:
        kv_init: of :data:`KV_INITS`.
        expert_init: of ``EXPERT_INITS``.

    Raises:
        ConfigError: the decoder cannot express the model, its consumers of Cross-Layer Attention
            would need keys and values that it does not have, or it cannot be divided into the
            experts. Nothing is changed then.
    """
    sections = {feature.key(): feature.to_dict() for feature in features}
    base = model.get_base_model() if is_adapted(model) else model
    if isinstance(base, PluginDecoderForCausalLM) and _has(base.config, sections):
        if DenseMoE.key() in sections:
            base.config.dense_moe = sections[DenseMoE.key()]
            experts.settle(base, DenseMoE.from_dict(base.config.dense_moe))
        return Conversion(base.config)
    config = decoder_config(model)
    _check_weights(model, _skeleton(config), storage)
    stock, before, apart = _sharing(config), config.experts, config.desync
    for key, section in sections.items():
        setattr(config, key, section)
    experts.check(config, before)
    unshared = tuple(range(config.num_hidden_layers)), False
    if stock not in (unshared, _sharing(config)):
        raise ConfigError(
            f"the model has {CrossLayerAttention.key()} {model.config.cross_layer_attention} and "
            f"cannot be given {config.cross_layer_attention}: its consumers have no keys and "
            "values of their own; convert the model that it was made from"
        )
    if apart is not None and _function(config)[1] != apart.function(config.num_hidden_layers):
        raise ConfigError(
            f"the model has {DesyncResidual.key()} {model.config.desync_residual} and cannot be "
            f"given {config.desync_residual}: norms of its ranks would have to become one, or "
            "other ones; convert the model that it was made from"
        )
    if kv_init == "mean" and stock == unshared:
        _average_keys_and_values(model, config, storage)
    skeleton = _skeleton(config)
    config._attn_implementation = model.config._attn_implementation
    old = dict(model.named_parameters())
    _become(model, skeleton)
    likes = _initialise_kv_norms(model, storage)
    if apart is None and config.desync is not None and config.desync.ranks is not None:
        likes |= _divide_norms(model, config.desync.ranks, storage)
    likes |= experts.start(model, config, expert_init, storage)
    new = dict(model.named_parameters())
    return Conversion(
        config,
        removed={name: old[name] for name in old if new.get(name) is not old[name]},
        added={name: new[name] for name in new if new[name] is not old.get(name)},
        likes=likes,
    )


def _has(config: PluginDecoderConfig, sections: dict[str, Any]) -> bool:
    """Whether ``sections`` would leave the function of the configuration's model as it is."""
    other = copy.copy(config)
    for key, section in sections.items():
        setattr(other, key, section)
    return _function(config) == _function(other)


def _function(config: PluginDecoderConfig) -> Any:
    layers, moe = config.num_hidden_layers, config.experts
    desync = config.desync and config.desync.function(layers)
    return config.ladder_layers, desync, _sharing(config), moe and moe.function(layers)


def _sharing(config: PluginDecoderConfig) -> tuple[tuple[int, ...], bool]:
    return config.kv_producers, config.separate_kv_norm


def _skeleton(config: PluginDecoderConfig) -> PluginDecoderForCausalLM:
    """The decoder without memory."""
    with torch.device("meta"):
        return PluginDecoderForCausalLM(config)


def _check_weights(model: nn.Module, skeleton: nn.Module, storage: Storage) -> None:
    """Refuse a model whose weights are not those of its configuration.

    Raises:
        ConfigError: names the weights that are missing, unknown or of another shape.
    """
    have = {name: tuple(storage.shape(p)) for name, p in model.named_parameters()}
    want = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if wrong:
        found = [f"{name} {have.get(name)}, expected {want.get(name)}" for name in wrong]
        raise ConfigError(f"weights do not fit the model's configuration: {'; '.join(found[:4])}")


def _become(module: nn.Module, skeleton: nn.Module) -> None:
    """Give ``module`` the class, attributes and children of ``skeleton``; its parameters, buffers
    and hooks stay, and so do the children that both have."""
    children = {}
    for name, child in skeleton._modules.items():
        own = module._modules.get(name)
        if own is None or child is None:
            children[name] = child
        else:
            _become(own, child)
            children[name] = own
        module.__dict__.pop(name, None)
    module._modules = children
    if type(module) is not type(skeleton) or not _of_torch(module):
        module.__class__ = type(skeleton)
        kept = {*vars(nn.Module()), *OF_THE_USER}
        for name, value in vars(skeleton).items():
            if name not in kept or name not in vars(module):
                vars(module)[name] = value


OF_THE_USER = (
    "generation_config",
    "gradient_checkpointing",
    "kernel_config",
    "loss_type",
    "name_or_path",
)
"""Attributes that a script or loader may have set on the model."""


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


@torch.no_grad()
def _average_keys_and_values(model: Any, config: PluginDecoderConfig, storage: Storage) -> None:
    """Give producers the mean over their groups, in fp32, one tensor at a time."""
    for group in sharing_groups(config.kv_producers):
        layers = [model.model.layers[index].self_attn for index in group]
        for name, produced in layers[0].named_parameters():
            if len(group) > 1 and name.startswith(("k_", "v_")):
                shared = [layer.get_parameter(name) for layer in layers]
                with storage.gather(shared):
                    produced.copy_(torch.stack([each.float() for each in shared]).mean(0))


def _divide_norms(model: nn.Module, ranks: int, storage: Storage) -> Parameters:
    """Give the norms of ranks their weights ``[T D]``, T copies of what there was ``[D]``; returns
    what each of them was copied from."""
    likes: Parameters = {}
    for prefix, norm in model.named_modules():
        if not isinstance(norm, RankNorm):
            continue
        for name, source in list(norm.named_parameters()):
            with storage.gather([source]):
                copies = source.detach().repeat(ranks)
            setattr(norm, name, nn.Parameter(copies, source.requires_grad))
            likes[f"{prefix}.{name}"] = source
    return likes


def _initialise_kv_norms(model: nn.Module, storage: Storage) -> Parameters:
    """Give new norms their memory; returns what each of their parameters was copied from."""
    likes = {}
    for prefix, layer in model.named_modules():
        norm = layer.self_attn.kv_norm if isinstance(layer, PluginDecoderLayer) else None
        if norm is None or not any(p.is_meta for p in norm.parameters()):
            continue
        norm.train(layer.training)
        for name, source in layer.input_layernorm.named_parameters():
            with storage.gather([source]):
                copy = nn.Parameter(source.detach().clone(), source.requires_grad)
            setattr(norm, name, copy)
            likes[f"{prefix}.self_attn.kv_norm.{name}"] = source
    return likes
