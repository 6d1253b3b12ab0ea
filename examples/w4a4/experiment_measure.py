"""What is measured of a trained model: outliers of activations, weights, and perplexities when
weights and activations have four bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from experiment_arms import INNER, RESIDUAL, Settings, sequences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torch_plugins.config import W4A4
from torch_plugins.ops.kurtosis import kurtosis
from torch_plugins.w4a4.linear import swap
from torch_plugins.w4a4.quantize import quantize_model
from torch_plugins.w4a4.quantizer import InputQuantizer, Mode, quantizers_of, set_mode
from torch_plugins.weight_quant import round_to_nearest

WEIGHTS = {"fp32": None, "RTN": "rtn", "GPTQ": "gptq"}
"""A scale for each row. What tables call them, and :func:`quantize_model`."""
ACTIVATIONS = {"fp32": "none", "static": "learned", "token": "dynamic-token"}
"""As they are; four bits between two fixed clips; four bits with a scale for each token."""


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """By name, those of the layers."""
    kinds = RESIDUAL + INNER
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in kinds
    }


@contextmanager
def watched(model: nn.Module, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Show each linear layer's input ``[tokens, I]``, before it is quantized, and its output."""

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        see(name, inputs[0].flatten(0, -2), output.flatten(0, -2))

    hooks = [m.register_forward_hook(partial(hook, name)) for name, m in linears(model).items()]
    yield
    for handle in hooks:
        handle.remove()


def channel_ratio(x: Tensor) -> float:
    """Of channels by their mean magnitude over tokens, the largest over the median.

    Args:
        x: ``[tokens, channels]``.
    """
    sizes = x.abs().mean(0)
    return (sizes.max() / sizes.median()).item()


@torch.no_grad()
def outliers(model: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """By linear layer: ``ratio`` of its input's channels, and the mean ``kurtosis`` over tokens of
    the input and of the ``output``."""
    found: dict[str, dict[str, float]] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = {
            "ratio": channel_ratio(x),
            "kurtosis": kurtosis(x).mean().item(),
            "output": kurtosis(y).mean().item(),
        }

    with watched(model, see):
        model(input_ids=ids)
    return found


@torch.no_grad()
def weights_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """By linear layer: mean ``kurtosis`` of the weight's rows, and the ``error`` of rounding it to
    four bits, ``|W - Q(W)|^2 / |W|^2``."""
    found = {}
    for name, module in linears(model).items():
        weight = module.weight
        error = (weight - round_to_nearest(weight).dequantize()).norm() / weight.norm()
        found[name] = {"kurtosis": kurtosis(weight).mean().item(), "error": error.item() ** 2}
    return found


@torch.no_grad()
def loss_of(model: Any, ids: Tensor) -> float:
    """Nats per token, of losses in fp64: rounded to fp32, two quantizations may have the same."""
    total = 0.0
    for part in ids.split(16):
        logits = model(input_ids=part).logits[:, :-1].double()
        total += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / ids[:, 1:].numel()


def perplexities(
    settings: Settings, stock: Callable[[], Any], model: Any, data: dict[str, Tensor]
) -> dict[str, Any]:
    """Of held-out text, for all ``WEIGHTS`` and ``ACTIVATIONS``.

    Args:
        stock: makes a model without the plugin.
        model: the trained one; its learned clips are the static ones if it has any.

    Returns:
        ``perplexities``, by "weights, activations", and the ``percentile`` of the static clips;
        None if they were learned.
    """
    held_out = sequences(settings, data["valid"], settings.validation_sequences)
    calibration = sequences(settings, data["train"], settings.calibration_sequences)
    results: dict[str, float] = {}
    percentile = None
    for activations, name in ACTIVATIONS.items():
        plain = stock()
        plain.load_state_dict(
            {key: value for key, value in model.state_dict().items() if "quantizer" not in key}
        )
        if activations == "token":
            swap(plain, W4A4(granularity="token", kurtosis_weight=0))
        elif activations == "static":
            percentile = _static(settings, plain, quantizers_of(model), calibration)
        for weights, method in WEIGHTS.items():
            quantized = copy.deepcopy(plain)
            if method is not None:
                quantize_model(quantized, calibration, method=method, activations=name)
            results[f"{weights}, {activations}"] = math.exp(loss_of(quantized, held_out))
    return {"perplexities": results, "percentile": percentile}


def _static(
    settings: Settings, plain: Any, learned: dict[str, InputQuantizer], ids: Tensor
) -> float | None:
    """Give ``plain`` the clips that training learned, or the best percentile, which is returned."""
    if learned:
        swap(plain, W4A4(kurtosis_weight=0))
        for name, quantizer in quantizers_of(plain).items():
            quantizer.load_state_dict(learned[name].state_dict())
        return None
    losses = {}
    for percentile in settings.percentiles:
        _calibrate(plain, percentile, ids)
        losses[percentile] = loss_of(plain, ids)
    best = min(losses, key=lambda percentile: losses[percentile])
    _calibrate(plain, best, ids)
    return best


def _calibrate(model: Any, percentile: float, ids: Tensor) -> None:
    """Let clips be at this percentile of the inputs. Quantizers observe with gradients only."""
    swap(model, W4A4(clip_init=f"percentile:{percentile}", kurtosis_weight=0))
    quantizers = quantizers_of(model).values()
    set_mode(quantizers, Mode.OBSERVE)
    model(input_ids=ids)
    for quantizer in quantizers:
        assert quantizer.observed is not None
        for name, value in quantizer.calibrate(*quantizer.observed).items():
            quantizer.get_parameter(name).data.copy_(value)
    set_mode(quantizers, Mode.QUANTIZE)
