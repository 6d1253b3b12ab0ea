"""Wrappers that stay cheap until a plugin is on: the rest of the package is imported only then."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

cpu_error: Exception | None = None
"""Why the CPU backend did not start; raised once Megatron parses its arguments."""


def block_submodules(
    original: Callable[..., Any], config: Any, spec: Any, *args: Any, **kwargs: Any
) -> Any:
    """Submodules of a TransformerBlock, its layer specs rewritten when plugins are on, or may be
    because a spec of ours was imported."""
    if (
        not getattr(config, "megatron_plugins", None)
        and "megatron_plugins.specs" not in sys.modules
    ):
        return original(config, spec, *args, **kwargs)
    from megatron_plugins import layers

    return layers.block_submodules(original, config, spec, *args, **kwargs)


def build_stack(original: Callable[..., None], stack: Any, *args: Any, **kwargs: Any) -> None:
    """A stack of a hybrid model, the specs of whose layers are rewritten when plugins are on."""
    config = args[0] if args else kwargs["config"]
    if not getattr(config, "megatron_plugins", None):
        return original(stack, *args, **kwargs)
    from megatron_plugins import hybrid

    return hybrid.build_stack(original, stack, *args, **kwargs)


def checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Activation checkpointing; only a feature that carries tensors from layer to layer differs."""
    carry = sys.modules.get("megatron_plugins.carry")
    if carry is None:
        return original(*args, **kwargs)
    return carry.through_checkpoint(original, *args, **kwargs)


def count(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """What the training log counts, parameters or operations, of layers without keys and values."""
    if not getattr(args, "cross_layer_attention", False):
        return original(args, *rest, **kwargs)
    from megatron_plugins.cross_layer_attention import accounting

    return accounting.with_mean_groups(original, args, *rest, **kwargs)


def loss_scale(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The loss of a micro-batch, by whose factor auxiliary losses are weighted too."""
    if "megatron_plugins.auxiliary_loss" not in sys.modules:
        return original(*args, **kwargs)
    from megatron_plugins import auxiliary_loss

    return auxiliary_loss.scale(original, *args, **kwargs)


def log(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The training log, to which layers add what they count."""
    if "megatron_plugins.metrics" not in sys.modules:
        return original(*args, **kwargs)
    from megatron_plugins import metrics

    return metrics.log(original, *args, **kwargs)


def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A step of training, before which quantizers are told what to do in it."""
    if "megatron_plugins.w4a4.calibration" not in sys.modules:
        return original(*args, **kwargs)
    from megatron_plugins.w4a4 import calibration

    return calibration.step(original, *args, **kwargs)


def optimizer_groups(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Overrides of parameter groups; clips may have a learning rate of their own."""
    overrides = original(*args, **kwargs)
    if not getattr(megatron_args(), "w4a4", False):
        return overrides
    from megatron_plugins.w4a4 import optimizer

    return optimizer.with_clips(overrides, *args, **kwargs)


def build_context(
    original: Callable[..., None], context: Any, model_config: Any, *args: Any, **kwargs: Any
) -> None:
    """A context of dynamic inference, whose caches layers may share."""
    if "cross_layer_attention" not in (getattr(model_config, "megatron_plugins", None) or {}):
        return original(context, model_config, *args, **kwargs)
    from megatron_plugins.cross_layer_attention import inference

    return inference.build_context(original, context, model_config, *args, **kwargs)


def build_engine(original: Callable[..., None], engine: Any, *args: Any, **kwargs: Any) -> None:
    """The static engine, which must not fall back in silence where layers share caches."""
    controller: Any = args[0] if args else kwargs["text_generation_controller"]
    config = controller.inference_wrapped_model.config
    if "cross_layer_attention" not in (getattr(config, "megatron_plugins", None) or {}):
        return original(engine, *args, **kwargs)
    from megatron_plugins.cross_layer_attention import inference

    return inference.build_engine(original, engine, *args, **kwargs)


def megatron_args() -> Any:
    """Megatron's global arguments; None outside its training loop, as when used as a library."""
    module = sys.modules.get("megatron.training.global_vars")
    try:
        return module.get_args() if module else None
    except AssertionError:  # not set yet
        return None


def install_cpu() -> None:
    """Start the CPU backend if it was asked for; called just before Megatron is first imported.

    A process that never imports Megatron, such as torchrun's own, keeps torch as it is.
    """
    global cpu_error
    try:
        from megatron_plugins import cpu

        if cpu.wanted(sys.argv, os.environ):
            cpu.install()
    except Exception as error:
        cpu_error = error


def check_cpu(flag_given: bool) -> None:
    """Raise what kept the CPU backend from starting.

    Raises:
        ConfigError: it refused to start, or its flag came too late to be seen.
    """
    if cpu_error is not None:
        raise cpu_error
    from megatron_plugins import cpu
    from torch_plugins.config import ConfigError

    if flag_given and not cpu.installed():
        raise ConfigError(
            f"{cpu.FLAG} was not on the command line when Megatron was imported; put it there, or "
            f"set {cpu.VARIABLE}=1"
        )
