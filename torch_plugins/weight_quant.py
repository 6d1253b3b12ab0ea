"""Weights in few bits after training: round to nearest, and GPTQ (arXiv 2210.17323).

A row of a weight is quantized in groups of columns, symmetrically, with ``2 ** bits`` codes:

    scale = 2 max|w| / (2 ** bits - 1)
    code  = clamp(round(w / scale), -2 ** (bits - 1), 2 ** (bits - 1) - 1)

*Round to nearest* does no more. *GPTQ* takes the columns one after another, and moves the error of
each to those that are still to come, so that the layer's output on calibration inputs X changes
least: with ``H = X^T X``, damped, and U the upper Cholesky factor of ``H ** -1``,

    e = (w_i - q_i) / U_ii,    w_j = w_j - e U_ij    for j > i

which is the optimal update of all columns behind i given those before (section 3 there), in blocks
whose other columns are updated together.

Shapes: O outputs, I inputs, G groups of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import ConfigError

BLOCK = 128
"""Columns whose errors are moved to the rest together, where a row is one group."""


class Quantized(NamedTuple):
    """A weight in few bits."""

    codes_OI: Tensor
    """int8."""
    scales_OG: Tensor
    """fp32 or wider."""

    def dequantize(self) -> Tensor:
        """``[O, I]``, in the dtype of the scales."""
        return self.codes_OI * _spread(self.scales_OG, self.codes_OI.shape[1])


def round_to_nearest(
    weight_OI: Tensor,
    bits: int = 4,
    group_size: int = -1,
    scale_dtype: torch.dtype | None = None,
) -> Quantized:
    """Every weight by itself.

    Args:
        group_size: columns with one scale; -1: a whole row.
        scale_dtype: what scales will be stored in; they are rounded to it before codes are chosen.

    Raises:
        ConfigError: the group size does not divide the columns.
    """
    scales = _scales(_wide(weight_OI), bits, _size(weight_OI, group_size), scale_dtype)
    return Quantized(_codes(weight_OI, _spread(scales, weight_OI.shape[1]), bits), scales)


def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    bits: int = 4,
    group_size: int = -1,
    damping: float = 0.01,
    act_order: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Quantized:
    """Columns in turn, each error moved to those behind it.

    Args:
        hessian_II: ``X^T X`` of calibration inputs ``[tokens, I]``; any positive multiple.
        group_size: as in :func:`round_to_nearest`. A group's scales are taken when its turn comes,
            from weights that have taken up the errors before.
        damping: share of the mean of H's diagonal that is added to it.
        act_order: take columns by falling diagonal of H. The groups stay those of the weight as it
            is, and their scales are taken before the first column.
        scale_dtype: as in :func:`round_to_nearest`.

    Raises:
        ConfigError: the group size does not divide the columns.
    """
    size = _size(weight_OI, group_size)
    weight, columns = _wide(weight_OI).clone(), weight_OI.shape[1]
    hessian = hessian_II.to(weight.dtype, copy=True)
    unused = hessian.diagonal() == 0  # inputs that are always 0
    hessian.diagonal()[unused] = 1
    weight[:, unused] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    scales = _scales(weight, bits, size, scale_dtype)
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True
    )
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = size if size < columns and not act_order else BLOCK
    for first in range(0, columns, step):
        end = min(first + step, columns)
        if not act_order and first % size == 0:
            group = weight[:, first : first + size]
            scales[:, first // size] = _scales(group, bits, size, scale_dtype)[:, 0]
        groups = order[first:end] // size
        block, factor = weight[:, first:end], upper[first:end, first:end]
        codes[:, first:end], errors = _block(block, scales[:, groups], factor, bits)
        weight[:, end:] -= errors @ upper[first:end, end:]
    return Quantized(torch.empty_like(codes).index_copy_(1, order, codes), scales)


def _block(weight: Tensor, scales: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of neighbouring columns, and the errors ``e`` to move to those behind them. ``weight``
    is changed."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        own, scale = weight[:, column], scales[:, column]
        codes[:, column] = _codes(own, scale, bits)
        errors[:, column] = (own - codes[:, column] * scale) / upper[column, column]
        weight[:, column:] -= torch.outer(errors[:, column], upper[column, column:])
    return codes, errors


def _size(weight: Tensor, group_size: int) -> int:
    columns = weight.shape[1]
    if group_size == -1:
        return columns
    if group_size < 1 or columns % group_size:
        raise ConfigError(f"group_size {group_size}: must divide the {columns} columns, or be -1")
    return group_size


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _scales(weight: Tensor, bits: int, size: int, dtype: torch.dtype | None) -> Tensor:
    """``[O, G]``, rounded to ``dtype``; of a group of zeros 1."""
    scales = weight.unflatten(1, (-1, size)).abs().amax(-1) * 2 / (2**bits - 1)
    if dtype is not None:
        scales = scales.to(dtype).to(weight.dtype)
    return torch.where(scales == 0, 1, scales)


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1)
    return (weight.to(scale.dtype) / scale).round().clamp(-most, most - 1).to(torch.int8)


def _spread(scales: Tensor, columns: int) -> Tensor:
    """``[O, G]`` to ``[O, I]``."""
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)
