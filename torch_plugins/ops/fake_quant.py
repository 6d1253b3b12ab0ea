"""Fake quantization of activations with two learned clips per tensor (arXiv 2404.03605).

With ``n = 2 ** bits - 1`` steps between the clips ``c- < c+``:

    s    = n / (c+ - c-)
    p    = (clamp(x, c-, c+) - c-) s          0 to n
    xhat = round(p) / s + c-

The zero point is not rounded, as in the paper: 0 need not be a level. The gradient is that of the
straight-through estimator, ``d round(p) / dp = 1``; with ``d = (p - round(p)) / n`` and g the
gradient of xhat,

    dx  = g                                         inside the clips, else 0
    dc+ = sum over x >= c+ of g  -  sum inside of d g
    dc- = sum over x <= c- of g  +  sum inside of d g

in fp32 or wider, whatever the dtype of x. A symmetric quantizer is ``fake_quant(x, c, -c, bits)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import call


def fake_quant_reference(x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int) -> Tensor:
    """:func:`fake_quant` by torch's own operators; no gradient."""
    wide, high, low, scale = _steps(x, clip_high, clip_low, bits)
    levels = ((wide.clamp(low, high) - low) * scale).round()
    return (levels / scale + low).to(x.dtype)


_fake_quant = torch.library.custom_op(
    "torch_plugins::fake_quant", fake_quant_reference, mutates_args=()
)


@_fake_quant.register_fake
def _(x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


def fake_quant_backward_reference(
    gradient: Tensor, x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, c+ and c-, from that of xhat."""
    wide, high, low, scale = _steps(x, clip_high, clip_low, bits)
    above, below = wide >= high, wide <= low
    inside = ~(above | below)
    place = (wide - low) * scale
    g = gradient.to(wide.dtype)
    rounding = torch.where(inside, (place - place.round()) * g, 0).sum() / (2**bits - 1)
    d_high = torch.where(above, g, 0).sum() - rounding
    d_low = torch.where(below, g, 0).sum() + rounding
    return (
        torch.where(inside, gradient, 0),
        d_high.to(clip_high.dtype).reshape(clip_high.shape),
        d_low.to(clip_low.dtype).reshape(clip_low.shape),
    )


fake_quant_backward = torch.library.custom_op(
    "torch_plugins::fake_quant_backward", fake_quant_backward_reference, mutates_args=()
)


@fake_quant_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(clip_high), torch.empty_like(clip_low)


def _steps(
    x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` and the clips in fp32 or wider, and steps per unit."""
    wide = torch.promote_types(x.dtype, torch.float32)
    high, low = (clip.to(wide).reshape(()) for clip in (clip_high, clip_low))
    return x.to(wide), high, low, (2**bits - 1) / (high - low)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.bits = inputs[3]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *fake_quant_backward(gradient, *ctx.saved_tensors, ctx.bits), None


_fake_quant.register_autograd(_differentiate, setup_context=_save)


def fake_quant(x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int = 4) -> Tensor:
    """``xhat`` of the shape and dtype of ``x``: at most ``2 ** bits`` values.

    Args:
        clip_high, clip_low: ``c+`` and ``c-``, of one element; ``c- < c+``, which is not checked
            here: it would wait for the GPU.
        bits: 1 to 31.
    """
    out: Tensor = call(torch.ops.torch_plugins.fake_quant.default, x, clip_high, clip_low, bits)
    return out
