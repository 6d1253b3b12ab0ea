"""Kurtosis of activations over their features, per token (arXiv 2404.03605).

With z = y - mean(y), means over the d features of a token, and m_k = mean(z ** k):

    K         = m_4 / (m_2 ** 2 + eps)
    dK / dy_i = 4 / d * (z_i ** 3 - m_3 - K m_2 z_i) / (m_2 ** 2 + eps)

in fp32 or wider. About 3 for normal features, 1.8 for uniform ones, d for a single feature that is
not zero: a penalty on it keeps features alike in size, so that few bits serve them all. The 3 of a
normal distribution is not subtracted, which no gradient sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("torch_plugins::kurtosis", mutates_args=())
def _kurtosis(y: Tensor, eps: float) -> Tensor:
    z = _centred(y)
    m_2, m_4 = (z**2).mean(-1), (z**4).mean(-1)
    return m_4 / (m_2**2 + eps)


@_kurtosis.register_fake
def _(y: Tensor, eps: float) -> Tensor:
    return y.new_empty(y.shape[:-1], dtype=_wide(y))


@torch.library.custom_op("torch_plugins::kurtosis_backward", mutates_args=())
def _kurtosis_backward(gradient: Tensor, y: Tensor, eps: float) -> Tensor:
    z = _centred(y)
    m_2, m_3, m_4 = ((z**power).mean(-1, keepdim=True) for power in (2, 3, 4))
    below = m_2**2 + eps
    slope = (z**3 - m_3 - m_4 / below * m_2 * z) * (4 / y.shape[-1]) / below
    return (gradient.unsqueeze(-1) * slope).to(y.dtype)


@_kurtosis_backward.register_fake
def _(gradient: Tensor, y: Tensor, eps: float) -> Tensor:
    return torch.empty_like(y)


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _centred(y: Tensor) -> Tensor:
    wide = y.to(_wide(y))
    return wide - wide.mean(-1, keepdim=True)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.eps = inputs[1]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _kurtosis_backward(gradient, *ctx.saved_tensors, ctx.eps), None


_kurtosis.register_autograd(_differentiate, setup_context=_save)


def kurtosis(y: Tensor, eps: float = 1e-6) -> Tensor:
    """K of every token, ``[..., d] -> [...]``, in fp32 or wider."""
    out: Tensor = _kurtosis(y, eps)
    return out
