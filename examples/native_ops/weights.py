"""One random matrix, and the forms in which the arms of the linear layer want it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from arms import Unavailable
from torch import Tensor

GROUP = 128


class Weight:
    """``[N, K]`` in fp32, of such size that outputs are near 1; each form is made once."""

    def __init__(self, k: int, n: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.fp32 = torch.randn(n, k, generator=generator).mul_(k**-0.5)
        self.k, self.n = k, n
        self._dequantized: dict[bool, Tensor] = {}

    @cached_property
    def bf16(self) -> Tensor:
        return self.fp32.bfloat16()

    @cached_property
    def per_channel(self) -> tuple[Tensor, Tensor]:
        """Codes -8 to 7 (int8), and scales ``[N, 1]``."""
        return to_int4(self.fp32, self.k)

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """The same with scales ``[N, K / 128]``."""
        if self.k % GROUP:
            raise Unavailable(f"{self.k} input features are no groups of {GROUP}")
        return to_int4(self.fp32, GROUP)

    def int4(self, groups: bool) -> tuple[Tensor, Tensor]:
        return self.groups if groups else self.per_channel

    def dequantized(self, groups: bool) -> Tensor:
        if groups not in self._dequantized:
            codes, scale = self.int4(groups)
            of_group = codes.float().unflatten(-1, (scale.shape[1], -1))
            self._dequantized[groups] = (of_group * scale.unsqueeze(-1)).flatten(1)
        return self._dequantized[groups]


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rounding to the nearest of 16 levels, the largest of each group being the outermost."""
    of_group = weight.unflatten(-1, (-1, group))
    scale = 2 * of_group.abs().amax(-1, keepdim=True) / 15
    scale = torch.where(scale == 0, 1, scale)
    codes = (of_group / scale).round_().clamp_(-8, 7).to(torch.int8)
    return codes.flatten(-2), scale.squeeze(-1)


def remembering(convert: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """``convert``, called anew only for another tensor: peers get inputs in the form they want."""
    last: list[object] = [None, None]

    def converted(x: Tensor) -> object:
        if last[0] is not x:
            last[:] = [x, convert(x)]
        return last[1]

    return converted
