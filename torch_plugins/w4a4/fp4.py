"""Weights in FP4, rounded to nearest on the grids of :mod:`torch_plugins.ops.dynamic_quant`.

A code is the number of a value of E2M1 among 0, 0.5, 1, 1.5, 2, 3, 4 and 6, plus 8 where its sign
is set; two codes are a byte, the one of the even column in its low half. Decoding a weight ``W``
and rounding it to its dtype gives ``fake_quant_fp4(W, grid)`` bit for bit.

Shapes: O outputs, I inputs, G blocks of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..feature import ConfigError
from ..ops.dynamic_quant import FP4Scales, e2m1, fp4_scales
from ..w4a4_config import BLOCKS

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that servers make one of, and so give one scale of the whole weight (nvfp4)."""


class QuantizedFP4(NamedTuple):
    """A weight in FP4."""

    codes_OI: Tensor
    """uint8, 0 to 15."""
    scales_OG: FP4Scales

    def dequantize(self) -> Tensor:
        """``[O, I]`` in fp32."""
        levels = torch.tensor(LEVELS, device=self.codes_OI.device)
        sizes = levels[(self.codes_OI & 7).long()]
        values = torch.where(self.codes_OI > 7, -sizes, sizes)
        scales = self.scales_OG.wide(torch.float32)
        size = values.shape[1] // max(scales.shape[1], 1)
        return (values.unflatten(1, (-1, size)) * scales.unsqueeze(-1)).flatten(1)


def quantize_fp4(
    weight_OI: Tensor, grid: str, largest: Tensor | None = None, name: str = "weight"
) -> QuantizedFP4:
    """Every weight by itself.

    Args:
        largest: for nvfp4, ``max|w|`` of all weights with the same scale of the whole; None: of
            this one.
        name: for the error.

    Raises:
        ConfigError: a weight is no finite number, which FP4 cannot say.
    """
    if not bool(torch.isfinite(weight_OI).all()):
        raise ConfigError(f"{name}: has weights that are NaN or infinite; FP4 has neither")
    blocks = weight_OI.float().unflatten(1, (-1, BLOCKS[grid]))
    scales = fp4_scales(blocks, grid, largest)
    values = e2m1(blocks / scales.wide(torch.float32).unsqueeze(-1)).flatten(1)
    levels = torch.tensor(LEVELS, device=values.device)
    codes = torch.bucketize(values.abs().contiguous(), levels) + 8 * values.signbit()
    return QuantizedFP4(codes.to(torch.uint8), scales)


def largest_of_fused(linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """``max|w|`` by a linear layer's name, over those of :data:`FUSED` that it is one with."""
    own = {name: linear.weight.detach().float().abs().amax() for name, linear in linears.items()}
    return {name: torch.stack([own[n] for n in _one_with(name, own)]).amax() for name in own}


def _one_with(name: str, names: Iterable[str]) -> list[str]:
    parent, _, last = name.rpartition(".")
    together = next((fused for fused in FUSED if last in fused), (last,))
    dot = "." if parent else ""
    return [other for other in names if other in {f"{parent}{dot}{part}" for part in together}]


def pack_fp4(codes_OI: Tensor) -> Tensor:
    """uint8 ``[O, I / 2]``."""
    return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_fp4`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)
