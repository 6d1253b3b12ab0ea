"""Kurtosis of activations over their features, per token (arXiv 2404.03605).

With z = y - mean(y), means over the d features of a token, and m_k = mean(z ** k):

    K         = m_4 / (m_2 ** 2 + eps)
    dK / dy_i = 4 / d * (z_i ** 3 - m_3 - K m_2 z_i) / (m_2 ** 2 + eps)

in fp32 or wider. About 3 for normal features, 1.8 for uniform ones, d for a single feature that is
not zero: a penalty on it keeps features alike in size, so that few bits serve them all. The 3 of a
normal distribution is not subtracted, which no gradient sees.

``eps`` only keeps features that are all equal from dividing 0 by 0. One that is not small beside
``m_2 ** 2`` makes K depend on the size of y: 1e-6, which other implementations add, is a thousand
times the ``m_2 ** 2`` of a residual projection at the usual initialization, whose penalty then is
nothing but a pull towards 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import call

EPS = 1e-20


def kurtosis_reference(y: Tensor, eps: float) -> Tensor:
    """:func:`kurtosis` by torch's own operators; no gradient."""
    squares = _centred(y) ** 2
    m_2, m_4 = squares.mean(-1), (squares**2).mean(-1)
    return (m_4 / (m_2**2 + eps)).contiguous()


_kurtosis = torch.library.custom_op("torch_plugins::kurtosis", kurtosis_reference, mutates_args=())


@_kurtosis.register_fake
def _(y: Tensor, eps: float) -> Tensor:
    return y.new_empty(y.shape[:-1], dtype=_wide(y))


def kurtosis_backward_reference(gradient: Tensor, y: Tensor, eps: float) -> Tensor:
    """The gradient of y, from that of K."""
    z = _centred(y)
    squares = z**2
    cubes = squares * z
    m_2, m_3, m_4 = (power.mean(-1, keepdim=True) for power in (squares, cubes, squares**2))
    below = m_2**2 + eps
    slope = (cubes - m_3 - m_4 / below * m_2 * z) * (4 / max(y.shape[-1], 1)) / below
    return (gradient.unsqueeze(-1) * slope).to(y.dtype)


kurtosis_backward = torch.library.custom_op(
    "torch_plugins::kurtosis_backward", kurtosis_backward_reference, mutates_args=()
)


@kurtosis_backward.register_fake
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
    return kurtosis_backward(gradient, *ctx.saved_tensors, ctx.eps), None


_kurtosis.register_autograd(_differentiate, setup_context=_save)


def kurtosis(y: Tensor, eps: float = EPS) -> Tensor:
    """K of every token, ``[..., d] -> [...]``, in fp32 or wider."""
    out: Tensor = call(torch.ops.torch_plugins.kurtosis.default, y, eps)
    return out


def kurtosis_of_parts(
    parts: Sequence[Tensor], gather: Callable[[Tensor], Tensor], eps: float = EPS
) -> Tensor:
    """K of several activations whose features R processes share evenly, ``[n, ...]``.

    Args:
        parts: this process's features of each of n activations, ``[..., d_k / R]``; all of the same
            tokens.
        gather: the tensors of all processes, stacked: ``[...] -> [R, ...]``. Called once, with the
            mean and three central moments of each token, which combine exactly::

                m   = mean over r of m_r,    delta_r = m_r - m
                m_2 = mean of  m_2r + delta_r ** 2
                m_3 = mean of  m_3r + 3 delta_r m_2r + delta_r ** 3
                m_4 = mean of  m_4r + 4 delta_r m_3r + 6 delta_r ** 2 m_2r + delta_r ** 4

    The gradient, of this process's features, needs no more from the others than K's own gradient,
    which must be the same in all.
    """
    out: Tensor = _KurtosisOfParts.apply(gather, eps, *parts)
    return out


class _KurtosisOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gather: Callable[[Tensor], Tensor], eps: float, *parts: Tensor) -> Tensor:
        everywhere = gather(torch.stack([_moments(part) for part in parts], 1))
        mean, m_2, m_3, m_4 = _combined(everywhere)
        below = m_2**2 + eps
        ctx.save_for_backward(mean, m_2, m_3, m_4 / below, below, *parts)
        ctx.processes = everywhere.shape[0]
        return m_4 / below

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        found, parts = saved[:5], saved[5:]
        grads = []
        for index, part in enumerate(parts):
            g, mean, m_2, m_3, value, below = (
                of_all[index].unsqueeze(-1) for of_all in (gradients[0], *found)
            )
            z = part.to(mean.dtype) - mean
            slope = (z**3 - m_3 - value * m_2 * z) * (4 / (part.shape[-1] * ctx.processes)) / below
            grads.append((g * slope).to(part.dtype))
        return None, None, *grads


def _moments(y: Tensor) -> Tensor:
    """Mean and three central moments over the features, ``[4, ...]``."""
    wide = y.to(_wide(y))
    mean = wide.mean(-1)
    z = wide - mean.unsqueeze(-1)
    squares = z**2
    return torch.stack([mean, *(x.mean(-1) for x in (squares, squares * z, squares**2))])


def _combined(moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of parts of equal size, ``[R, 4, ...]``, put together."""
    means, m_2, m_3, m_4 = moments.unbind(1)
    mean = means.mean(0)
    delta = means - mean
    return (
        mean,
        (m_2 + delta**2).mean(0),
        (m_3 + 3 * delta * m_2 + delta**3).mean(0),
        (m_4 + 4 * delta * m_3 + 6 * delta**2 * m_2 + delta**4).mean(0),
    )
