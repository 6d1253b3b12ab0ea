"""Linear layers of PyTorch that train for four bits: those of Hugging Face models, also under
DeepSpeed. Megatron's have an adapter of their own.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..auxiliary_loss import AuxiliaryLoss
from ..feature import ConfigError
from ..ops.dynamic_quant import fake_quant_fp4, fake_quant_rows
from ..ops.kurtosis import kurtosis
from ..w4a4_config import W4A4
from .marker import mark
from .quantizer import InputQuantizer, check_blocks

HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier", "router", "gate")
"""Last names of modules that are never quantized: output layers and routers."""


class FakeQuantLinear(nn.Linear):
    """``y = Q_w(W) Q(x) + b``, with a penalty on the kurtosis of y; see :func:`swap`.

    Either quantization is there or not, as the feature says: ``input_quantizer`` is None without
    bits for activations.
    """

    feature: W4A4
    input_quantizer: InputQuantizer | None
    kurtosis_loss: AuxiliaryLoss | None

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        y = linear(x, self.weight, self.bias, self.feature)
        if self.kurtosis_loss is None or not torch.is_grad_enabled() or not y.requires_grad:
            return y
        return self.kurtosis_loss.attach(y, kurtosis(y).mean())

    def extra_repr(self) -> str:
        bits = self.feature.weight_bits
        return super().extra_repr() + (f", weight_bits={bits}" if bits else "")


def fake_quant_weight(weight_OI: Tensor, feature: W4A4) -> Tensor:
    """``Q_w(W)`` with the gradient of W: symmetric for each group of a row, or FP4."""
    if not feature.weight_bits:
        return weight_OI
    if feature.grid != "int4":
        return fake_quant_fp4(weight_OI, feature.grid)
    size = feature.weight_group_size
    groups = weight_OI if size == -1 else weight_OI.unflatten(1, (-1, size))
    return fake_quant_rows(groups, feature.weight_bits).reshape(weight_OI.shape)


def linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None, feature: W4A4) -> Tensor:
    """``Q_w(W) x + b``, without keeping ``Q_w(W)`` for the backward pass."""
    if not feature.weight_bits:
        return F.linear(x, weight_OI, bias)
    out: Tensor = _QuantizedLinear.apply(x, weight_OI, bias, feature)
    return out


class _QuantizedLinear(torch.autograd.Function):
    """Keeps the weight itself, which ZeRO 3 gathers again, and quantizes it again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feature: W4A4) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.feature, ctx.has_bias = feature, bias is not None
        return F.linear(x, fake_quant_weight(weight.detach(), feature), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        # Under autocast g is narrower than both.
        wide = fake_quant_weight(weight.detach(), ctx.feature).to(g.dtype) if need_x else None
        dx = (g @ wide).to(x.dtype) if wide is not None else None
        rows = g.flatten(0, -2)
        dw = (rows.T @ x.flatten(0, -2).to(g.dtype)).to(weight.dtype) if need_weight else None
        return dx, dw, rows.sum(0).to(weight.dtype) if ctx.has_bias and need_bias else None, None


def targets(model: nn.Module, feature: W4A4) -> dict[str, nn.Linear]:
    """The linear layers of a model that the feature selects, by name.

    Raises:
        ConfigError: there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] not in HEADS
        and feature.selects(name)
    }
    if not found:
        raise ConfigError(
            f"{feature.spelled('modules')} {feature.modules!r}: matches no linear layer of "
            f"{type(model).__name__}; names are such as "
            + ", ".join([n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:3])
        )
    return found


def swap(model: nn.Module, feature: W4A4, names: Iterable[str] | None = None) -> list[str]:
    """Make linear layers of a model :class:`FakeQuantLinear`, in place; their weights stay.

    A model of transformers writes it into its ``config.json`` from then on; see ``marker.py``.

    Args:
        names: of the layers; by default those that ``feature.modules`` selects.

    Returns:
        Their names. Those that are one already keep their clips, and take what else the feature
        says.

    Raises:
        ConfigError: nothing is selected, a layer is not a plain ``nn.Linear``, its features are no
            whole blocks, or it quantizes in another way already; nothing was changed then.
    """
    chosen = targets(model, feature)
    if names is not None:
        chosen = {name: module for name, module in chosen.items() if name in set(names)}
    _check_present(model, chosen, feature)
    for name, module in chosen.items():
        if type(module) not in (nn.Linear, FakeQuantLinear):
            raise ConfigError(
                f"{feature.spelled('modules')}: {name} is a {type(module).__qualname__}, not a "
                f"plain nn.Linear; exclude it with '!{name}'"
            )
        check_blocks(feature, module.in_features, name)
    mark(model, feature, chosen)
    for name, module in chosen.items():
        _become(module, feature, name.rpartition(".")[2])
    return list(chosen)


def fake_quant_linears(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The linear layers of a model that have W4A4, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, FakeQuantLinear)}


def same_function(one: W4A4, other: W4A4) -> bool:
    """Whether a layer of both computes the same; which layers have it is not compared."""
    return replace(one, modules="*").function(0) == replace(other, modules="*").function(0)


def _check_present(model: nn.Module, chosen: Iterable[str], feature: W4A4) -> None:
    present = fake_quant_linears(model)
    if left := sorted(present.keys() - set(chosen)):
        raise ConfigError(
            f"{feature.spelled('modules')} {feature.modules!r}: leaves out {left[0]}, which has "
            "W4A4 already; select it too"
        )
    for name, module in present.items():
        if not same_function(module.feature, feature):
            raise ConfigError(
                f"{feature.key()}: {name} has {module.feature.to_dict()} already and cannot be "
                f"given {feature.to_dict()}; give the same bits, granularity and grid"
            )


def _become(module: Any, feature: W4A4, kind: str) -> None:
    weight = module.weight
    if not isinstance(module, FakeQuantLinear):
        module.__class__ = FakeQuantLinear
        module.input_quantizer = (
            InputQuantizer(feature, weight.dtype, weight.device)
            if feature.activation_bits
            else None
        )
    elif module.input_quantizer is not None:
        module.input_quantizer.feature = feature
    module.feature = feature
    module.kurtosis_loss = (
        AuxiliaryLoss(f"kurtosis_{kind}", feature.kurtosis_weight)
        if feature.kurtosis_weight
        else None
    )
