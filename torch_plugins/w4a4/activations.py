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
from ..ops.dynamic_quant import fake_quant_rows


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


Input = StaticInput | TokenInput


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
