"""Fake quantization of activations and their kurtosis, reading them once.

For a tensor that is quantized and whose kurtosis is penalized, as the input of a linear layer may
be (arXiv 2404.03605)::

    xhat = fake_quant(x, c+, c-)
    K    = kurtosis(x)

K is that of x and not of xhat: the outliers that a penalty is to bring in lie beyond the clips,
where xhat has no gradient. With g and h the gradients of xhat and of K,

    dx  = g inside the clips + h dK / dx
    dc+, dc- as for fake quantization alone

where the two terms are added in fp32 or wider and rounded once. See :mod:`.fake_quant` and
:mod:`.kurtosis` for the formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import call
from .fake_quant import fake_quant_backward, fake_quant_backward_reference, fake_quant_reference
from .kurtosis import EPS, kurtosis_backward, kurtosis_backward_reference, kurtosis_reference


def fake_quant_kurtosis_reference(
    x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quant_kurtosis` by torch's own operators; no gradient."""
    return fake_quant_reference(x, clip_high, clip_low, bits), kurtosis_reference(x, eps)


_fake_quant_kurtosis = torch.library.custom_op(
    "torch_plugins::fake_quant_kurtosis", fake_quant_kurtosis_reference, mutates_args=()
)


@_fake_quant_kurtosis.register_fake
def _(
    x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=wide)


def fake_quant_kurtosis_backward_reference(
    g_xhat: Tensor,
    g_k: Tensor,
    x: Tensor,
    clip_high: Tensor,
    clip_low: Tensor,
    bits: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, c+ and c-."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    through, d_high, d_low = fake_quant_backward_reference(
        g_xhat.to(wide.dtype), wide, clip_high, clip_low, bits
    )
    return (through + kurtosis_backward_reference(g_k, wide, eps)).to(x.dtype), d_high, d_low


_fake_quant_kurtosis_backward = torch.library.custom_op(
    "torch_plugins::fake_quant_kurtosis_backward",
    fake_quant_kurtosis_backward_reference,
    mutates_args=(),
)


@_fake_quant_kurtosis_backward.register_fake
def _(
    g_xhat: Tensor,
    g_k: Tensor,
    x: Tensor,
    clip_high: Tensor,
    clip_low: Tensor,
    bits: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(clip_high), torch.empty_like(clip_low)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, float], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.bits, ctx.eps = inputs[3:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g_xhat: Tensor | None, g_k: Tensor | None) -> tuple[Any, ...]:
    x, clip_high, clip_low = ctx.saved_tensors
    if g_xhat is None and g_k is None:
        return (None,) * 5
    if g_xhat is None:
        return kurtosis_backward(g_k, x, ctx.eps), None, None, None, None
    clips = (clip_high, clip_low, ctx.bits)
    if g_k is None:
        return *fake_quant_backward(g_xhat, x, *clips), None, None
    return *_fake_quant_kurtosis_backward(g_xhat, g_k, x, *clips, ctx.eps), None, None


_fake_quant_kurtosis.register_autograd(_differentiate, setup_context=_save)


def fake_quant_kurtosis(
    x: Tensor, clip_high: Tensor, clip_low: Tensor, bits: int = 4, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """``xhat`` of the shape and dtype of ``x``, and K of every token, in fp32 or wider.

    Args:
        x: ``[..., d]``, tokens of d features.
        clip_high, clip_low: ``c+`` and ``c-``, of one element; see :func:`.fake_quant.fake_quant`.
        eps: see :mod:`.kurtosis`.
    """
    op = torch.ops.torch_plugins.fake_quant_kurtosis.default
    out: tuple[Tensor, Tensor] = call(op, x, clip_high, clip_low, bits, eps)
    return out
