"""The fake quantization of a linear layer's input (arXiv 2404.03605, section 4), in every host.

An :class:`InputQuantizer` has the learned clips where there are any, and a :class:`Mode` that the
host sets by iteration. Clips that start at a percentile are 0 until the host calls
:meth:`InputQuantizer.calibrate`, also in checkpoints: 0 says that nothing was measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..feature import ConfigError
from ..ops.dynamic_quant import fake_quant_fp4, fake_quant_rows
from ..ops.fake_quant import fake_quant
from ..w4a4_config import BLOCKS, W4A4

SAMPLE = 2**20
"""Elements of an input that a percentile is taken of, evenly spaced."""

Reduce = Callable[[Tensor], Tensor]
"""The largest over the processes that have a part of the features each, elementwise."""


class Mode(Enum):
    """What quantizers do."""

    OFF = "off"
    OBSERVE = "observe"
    """Leave inputs as they are, and in training remember where clips should start."""
    QUANTIZE = "quantize"


class InputQuantizer(nn.Module):
    """``x -> Q(x)``; parameters ``clip_high`` and, of an asymmetric one, ``clip_low``, shape [1].

    Symmetric, with the clip c: codes ``-2 ** (b - 1)`` to ``2 ** (b - 1) - 1`` in steps of
    ``2 c / (2 ** b - 1)``, as weights have them.

    Args:
        dtype, device: of the clips.
        reduce: where the processes of tensor parallelism have parts of the features.
    """

    def __init__(
        self,
        feature: W4A4,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        self.feature, self.reduce = feature, reduce
        self.mode = Mode.QUANTIZE
        self.observed: tuple[Tensor, Tensor] | None = None
        """The largest upper and the smallest lower percentile, until :meth:`calibrate`."""
        if feature.learned:
            start = 0.0 if feature.percentile is not None else float(feature.clip_init)
            value = torch.full((1,), start, dtype=dtype, device=device)
            self.clip_high = nn.Parameter(value)
            if not feature.symmetric:
                self.clip_low = nn.Parameter(-value)

    def forward(self, x: Tensor) -> Tensor:
        feature = self.feature
        if self.mode is not Mode.QUANTIZE:
            if self.mode is Mode.OBSERVE and feature.learned and self._trains():
                self._observe(x.detach())
            return _PassThrough.apply(x, *self.parameters())
        if feature.grid != "int4":
            largest = self._largest(x, None) if feature.grid == "nvfp4" else None
            return fake_quant_fp4(x, feature.grid, largest)
        if feature.granularity == "token":
            return fake_quant_rows(x, feature.activation_bits, self._largest(x, -1))
        return fake_quant(x, *self.clips(), feature.activation_bits)

    def _trains(self) -> bool:
        """Not where a script only evaluates, whether it says so by ``eval`` or by ``no_grad``."""
        return self.training and torch.is_grad_enabled()

    def clips(self) -> tuple[Tensor, Tensor]:
        """The highest and the lowest level, ``[1]`` each, as functions of the parameters."""
        if not self.feature.symmetric:
            return self.clip_high, self.clip_low
        most = 2 ** (self.feature.activation_bits - 1)
        step = self.clip_high.to(torch.promote_types(self.clip_high.dtype, torch.float32))
        step = step / (most - 0.5)
        return step * (most - 1), -step * most

    def _largest(self, x: Tensor, dim: int | None) -> Tensor | None:
        """``max|x|`` over all processes; None where there is one."""
        if self.reduce is None:
            return None
        size = x.detach().abs()
        return self.reduce(size.amax() if dim is None else size.amax(dim, keepdim=True))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        flat = x.flatten()
        flat = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float()
        if not flat.numel():
            return
        share = (self.feature.percentile or 100.0) / 100
        high, low = torch.quantile(flat, share), torch.quantile(flat, 1 - share)
        if self.observed is not None:
            high, low = torch.maximum(high, self.observed[0]), torch.minimum(low, self.observed[1])
        self.observed = high, low

    def uncalibrated(self) -> bool:
        """Whether clips still wait for their percentiles."""
        return self.feature.learned and not self.clip_high.any()

    @torch.no_grad()
    def calibrate(self, high: Tensor, low: Tensor) -> dict[str, Tensor]:
        """Forget what was observed, and return what the parameters should become, by name."""
        self.observed = None
        high, low = high.float().reshape(1), low.float().reshape(1)
        if self.feature.symmetric:
            return {"clip_high": torch.maximum(high, -low).clamp(min=1e-6)}
        return {"clip_high": torch.maximum(high, low + 1e-6), "clip_low": low}

    def extra_repr(self) -> str:
        feature = self.feature
        kind = feature.granularity if feature.grid == "int4" else feature.grid
        return f"bits={feature.activation_bits}, {kind}, mode={self.mode.value}"


class _PassThrough(torch.autograd.Function):
    """``x``; the clips get gradients of 0, which reducers of gradients wait for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *clips: Tensor) -> Tensor:
        ctx.clips = [(clip.shape, clip.dtype, clip.device) for clip in clips]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        zeros = [torch.zeros(s, dtype=dtype, device=place) for s, dtype, place in ctx.clips]
        return gradients[0], *zeros


def quantizers_of(model: nn.Module) -> dict[str, InputQuantizer]:
    """Every input quantizer in a model, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, InputQuantizer)}


def set_mode(quantizers: Iterable[InputQuantizer], mode: Mode) -> None:
    for quantizer in quantizers:
        quantizer.mode = mode


def mode_at(feature: W4A4, iteration: int, uncalibrated: bool) -> Mode:
    """What the quantizers of a model do in an iteration, the first being 0.

    Args:
        uncalibrated: whether clips wait for percentiles, which takes an iteration: the one before
            ``start_iteration``, or the first.
    """
    if iteration < feature.start_iteration:
        last = iteration == feature.start_iteration - 1
        return Mode.OBSERVE if last and uncalibrated else Mode.OFF
    return Mode.OBSERVE if uncalibrated else Mode.QUANTIZE


def check_blocks(feature: W4A4, width: int, module: str) -> None:
    """Refuse a linear layer whose input features (here ``width``) are no whole blocks or groups.

    Raises:
        ConfigError: names the layer, the field and the remedy.
    """
    block = BLOCKS.get(feature.grid, 1) if feature.activation_bits or feature.weight_bits else 1
    group = feature.weight_group_size if feature.weight_bits else -1
    for name, size in (("grid", block), ("weight_group_size", group)):
        if size != -1 and width % size:
            raise ConfigError(
                f"{feature.spelled(name)} {getattr(feature, name)!r}: {module} has {width} input "
                f"features here, not a multiple of {size}; exclude it with "
                f"{feature.spelled('modules')} '!{module}'"
            )
