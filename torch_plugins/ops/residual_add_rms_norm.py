"""The step between two modules of a decoder: add to the residual stream, and RMS-normalize it.

With D features, w the weight and fp32 (fp64 for fp64) wherever nothing else is said,

    s = residual + update                       rounded to the dtype of the stream
    r = 1 / sqrt(mean(s ** 2) + eps)            one for each token
    y = s r w                                   rounded to that dtype once, at the end

s is what the stream keeps, and so what is normalized. With g_s and g_y the gradients of s and y,
n = s r, and means over features,

    d residual = d update = g_s + r (g_y w - n mean(g_y w n))      rounded once
    d w = sum over tokens of g_y n

``F.rms_norm``, and with it ``torch.nn.RMSNorm`` and Megatron's ``WrappedTorchNorm``, round y like
this. The norms of Llama and its relatives in transformers, and the decoder of this package, round
``s r`` to the stream's dtype before they multiply by w, which in half precision rounds twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import call


def residual_add_rms_norm_reference(
    residual: Tensor, update: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """s, y and r by torch's own operators; no gradient."""
    total = (residual + update).contiguous()
    wide = total.to(_wide(total))
    rstd = torch.rsqrt((wide**2).mean(-1) + eps)
    normed = wide * rstd.unsqueeze(-1)
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    return total, normed.to(total.dtype), rstd


_residual_add_rms_norm = torch.library.custom_op(
    "torch_plugins::residual_add_rms_norm", residual_add_rms_norm_reference, mutates_args=()
)


@_residual_add_rms_norm.register_fake
def _(
    residual: Tensor, update: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = residual.new_empty(residual.shape[:-1], dtype=_wide(residual))
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape), rows


def residual_add_rms_norm_backward_reference(
    g_sum: Tensor | None, g_normed: Tensor, total: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of both the residual and the update, and that of the weight, or nothing."""
    r = rstd.unsqueeze(-1)
    g = g_normed.to(r.dtype)
    n = total.to(r.dtype) * r
    weighted = g if weight is None else g * weight.to(r.dtype)
    dx = r * (weighted - n * (weighted * n).mean(-1, keepdim=True))
    if g_sum is not None:
        dx = dx + g_sum.to(r.dtype)
    dx = dx.to(total.dtype).contiguous()
    if weight is None:
        return dx, total.new_empty(0)
    return dx, (g * n).unsqueeze(0).flatten(0, -2).sum(0).to(weight.dtype)


_residual_add_rms_norm_backward = torch.library.custom_op(
    "torch_plugins::residual_add_rms_norm_backward",
    residual_add_rms_norm_backward_reference,
    mutates_args=(),
)


@_residual_add_rms_norm_backward.register_fake
def _(
    g_sum: Tensor | None, g_normed: Tensor, total: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    d_weight = total.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return total.new_empty(total.shape), d_weight


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    total, _, rstd = output
    ctx.save_for_backward(total, rstd, inputs[2])
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, g_sum: Tensor | None, g_normed: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    total, rstd, weight = ctx.saved_tensors
    if g_normed is None:
        return g_sum, g_sum, None, None
    dx, d_weight = _residual_add_rms_norm_backward(g_sum, g_normed, total, rstd, weight)
    return dx, dx, None if weight is None else d_weight, None


_residual_add_rms_norm.register_autograd(_differentiate, setup_context=_save)


def residual_add_rms_norm(
    residual: Tensor, update: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """s and y, both of the shape and dtype of ``residual``.

    Args:
        residual, update: ``[..., D]``, of one shape and dtype.
        weight: ``[D]``, of any floating dtype; None: 1.
    """
    op = torch.ops.torch_plugins.residual_add_rms_norm.default
    total, normed, _ = call(op, residual, update, weight, eps)
    return total, normed
