"""Fake quantization with scales that follow the data: nothing is learned.

*Integers*, symmetric, with ``2 ** bits`` codes and one scale for each token, row or group::

    scale = 2 max|x| / (2 ** bits - 1)
    xhat  = scale clamp(round(x / scale), -2 ** (bits - 1), 2 ** (bits - 1) - 1)

*FP4* (E2M1): the values 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign, ties to the even mantissa, and a
scale for each block of neighbouring features:

=======  =====  ==========================================================  ================
grid     block  scale of a block                                            source
=======  =====  ==========================================================  ================
mxfp4    32     ``2 ** (floor(log2 max|x|) - 2)``                           OCP MX 1.0
nvfp4    16     ``e4m3(g max|x| / 6) / g``, ``g = 6 448 / max over all|x|``  arXiv 2509.25149
=======  =====  ==========================================================  ================

A block of nvfp4 whose scale is 0 in e4m3 becomes 0.

The gradient is that of the straight-through estimator, ``dx = g``, the scales taken as constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..w4a4_config import BLOCKS

E2M1_MAX, E4M3_MAX = 6.0, 448.0
E8M0_BIAS = 127
UNUSED = 0.125
"""Stands for a scale of 0 in e4m3, as in compressed-tensors: all of its block rounds to 0."""


def fake_quant_rows(x: Tensor, bits: int = 4, largest: Tensor | None = None) -> Tensor:
    """Integers with one scale for each vector along the last dimension.

    Args:
        largest: ``max|x|`` over it, ``[..., 1]``, where ``x`` is only a part of the vectors.
    """
    with torch.no_grad():
        wide = _wide(x)
        largest = wide.abs().amax(-1, keepdim=True) if largest is None else largest.to(wide.dtype)
        scale = 2 * largest / (2**bits - 1)
        scale = torch.where(scale == 0, 1, scale)
        most = 2 ** (bits - 1)
        quantized = ((wide / scale).round().clamp(-most, most - 1) * scale).to(x.dtype)
    return _straight_through(x, quantized)


def fake_quant_fp4(x: Tensor, grid: str, largest: Tensor | None = None) -> Tensor:
    """FP4 in blocks along the last dimension, which they divide.

    Args:
        grid: ``mxfp4`` or ``nvfp4``.
        largest: ``max|x|``, no dimensions, for nvfp4 where ``x`` is only a part of the tensor.
    """
    with torch.no_grad():
        blocks = _wide(x).unflatten(-1, (-1, BLOCKS[grid]))
        scale = fp4_scales(blocks, grid, largest).wide(blocks.dtype).unsqueeze(-1)
        quantized = (e2m1(blocks / scale) * scale).flatten(-2).to(x.dtype)
    return _straight_through(x, quantized)


class FP4Scales(NamedTuple):
    """Scales as folders store them."""

    of_block: Tensor
    """mxfp4: uint8, the exponent + 127 (E8M0). nvfp4: e4m3."""
    whole: Tensor | None = None
    """nvfp4: g, by which scales are divided, no dimensions."""

    def wide(self, dtype: torch.dtype) -> Tensor:
        """What a block is divided by."""
        if self.whole is None:
            one = torch.ones_like(self.of_block, dtype=dtype)
            return torch.ldexp(one, self.of_block.int() - E8M0_BIAS)
        return self.of_block.to(dtype) / self.whole.to(dtype)


def fp4_scales(blocks: Tensor, grid: str, largest: Tensor | None = None) -> FP4Scales:
    """Of blocks ``[..., block]`` in fp32 or wider; arguments as for :func:`fake_quant_fp4`."""
    of_block = blocks.abs().amax(-1)
    if grid == "mxfp4":
        _, exponent = torch.frexp(of_block)  # of_block = m 2 ** exponent, m in [1/2, 1)
        return FP4Scales(e8m0(exponent - 3))
    if largest is None:
        largest = of_block.amax() if of_block.numel() else of_block.new_zeros(())
    largest = largest.to(blocks.dtype)
    whole = (E2M1_MAX * E4M3_MAX / largest).clamp(max=torch.finfo(blocks.dtype).max)
    whole = torch.where(largest == 0, 1, whole)
    share = (of_block / E2M1_MAX * whole).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    wide = share.to(blocks.dtype)
    return FP4Scales(torch.where(wide == 0, UNUSED, wide).to(torch.float8_e4m3fn), whole)


def e8m0(exponent: Tensor) -> Tensor:
    """Powers of two by their exponents, -127 to 127, in uint8."""
    return (exponent.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).to(torch.uint8)


def e2m1(x: Tensor) -> Tensor:
    """The nearest of the 15 values, ties to the even mantissa; beyond 6: 6."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step).clamp(max=E2M1_MAX) * x.sign()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _StraightThrough(torch.autograd.Function):
    """``quantized``, with the gradient of ``x``; the difference added to ``x`` would be rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    return _StraightThrough.apply(x, quantized) if x.requires_grad else quantized
