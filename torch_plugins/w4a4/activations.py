"""Quantization of a linear layer's input after training, as quantized folders have it.

With integers from ``-2 ** (b - 1)`` to ``2 ** (b - 1) - 1``, a scale s and a zero point z::

    code = round(clamp(x / s + z, ...)),    xhat = (code - z) s

in this order, which is that of compressed-tensors, so that both round alike. The clips c+ and c-
of arXiv 2404.03605 become ``s = (c+ - c-) / (2 ** b - 1)`` and ``z = -2 ** (b - 1) - c- / s``: the
same levels, for the zero point stays what it is there, a real number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..feature import ConfigError
from ..ops.dynamic_quant import FP4Scales, e2m1, e8m0, fake_quant_rows
from ..w4a4_config import BLOCKS


class StaticInput(NamedTuple):
    """One scale for all tokens."""

    scale: Tensor
    """fp32, ``[1]``."""
    zero_point: Tensor | None = None
    """fp32, ``[1]``; None: symmetric."""
    bits: int = 4

    def __call__(self, x: Tensor) -> Tensor:
        most = 2 ** (self.bits - 1)
        scale = self.scale.to(x.device)
        places = x / scale
        if self.zero_point is None:
            return places.clamp(-most, most - 1).round() * scale
        zero = self.zero_point.to(x.device)
        return ((places + zero).clamp(-most, most - 1).round() - zero) * scale

    def range(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        most, zero = 2 ** (self.bits - 1), 0.0 if self.zero_point is None else self.zero_point
        return float((-most - zero) * self.scale), float((most - 1 - zero) * self.scale)


class TokenInput(NamedTuple):
    """Symmetric, a scale for each token."""

    bits: int = 4

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quant_rows(x, self.bits)


class BlockInput(NamedTuple):
    """FP4 in blocks of 32 features, as compressed-tensors computes mxfp4.

    With ``max|x| = m 2 ** e``, m in [1, 2), the scale is ``2 ** (e - 2)``, and ``2 ** (e - 1)``
    from m = 1.75 on, where the largest would round to 8; the grid that is trained with (OCP MX 1.0)
    keeps ``2 ** (e - 2)`` there and clamps at 6.
    """

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        blocks = wide.unflatten(-1, (-1, BLOCKS["mxfp4"]))
        half, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # half: m / 2
        scale = FP4Scales(e8m0(exponent - 3 + (half >= 0.875))).wide(blocks.dtype)
        return (e2m1(blocks / scale) * scale).flatten(-2).to(x.dtype)


Input = StaticInput | TokenInput | BlockInput


def quantizing(how: Input) -> Callable[[Any, tuple[Any, ...]], tuple[Tensor]]:
    """A hook before a linear layer's forward."""
    return lambda linear, args: (how(args[0]),)


def from_clips(name: str, high: Tensor, low: Tensor | None, bits: int) -> StaticInput:
    """The clips of a linear layer as scale and zero point.

    Args:
        low: c-; None: a symmetric quantizer, of which ``high`` is the clip c.

    Raises:
        ConfigError: the clips are 0, no numbers, or in the wrong order.
    """
    high = high.detach().float().reshape(1)
    if low is None:
        good = bool(torch.isfinite(high)) and bool(high > 0)
        static = StaticInput(2 * high / (2**bits - 1), None, bits)
    else:
        low = low.detach().float().reshape(1)
        good = bool(torch.isfinite(high) & torch.isfinite(low)) and bool(high > low)
        scale = (high - low) / (2**bits - 1)
        static = StaticInput(scale, -(2 ** (bits - 1)) - low / scale, bits)
    if not good:
        clips = [float(clip) for clip in (high, low) if clip is not None]
        raise ConfigError(
            f"clips of {name} are {clips}: never measured, or the training diverged; train on, or "
            "give activations dynamic-token"
        )
    return static
