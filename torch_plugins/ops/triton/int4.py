"""The linear layer of :mod:`torch_plugins.ops.int4` in Triton: int4 storage, int8 products.

Codes of the input are kept as ``[T, 2, ceil(I / 2)]``, even features before odd ones: byte k of a
weight then meets the codes k of both halves, and is taken apart without moving anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Features of a row that are quantized at a time."""


@triton.jit
def quantize_kernel(
    x: tl.tensor,
    given_scale: tl.tensor,
    zero: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    features: tl.tensor,
    width: tl.tensor,
    BITS: tl.constexpr,
    GIVEN: tl.constexpr,
    SHIFTED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One row of x to codes and its scale, which is NaN where a code is lost to one."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COLUMNS)
    if GIVEN:
        s = tl.load(given_scale).to(tl.float32)
    else:
        # Floats without a sign are in the order of their bits, and NaN is the largest.
        largest = tl.zeros([COLUMNS], tl.int32)
        for first in range(0, features, COLUMNS):
            i = first + at
            value = tl.load(x + row * features + i, mask=i < features, other=0).to(tl.float32)
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        top = tl.max(largest, 0).to(tl.float32, bitcast=True)
        s = tl.div_rn(2 * top, 2.0**BITS - 1)
        s = tl.where(s == 0, 1.0, s)
    lost = tl.zeros([COLUMNS], tl.int32)
    most: tl.constexpr = 2.0 ** (BITS - 1)
    for first in range(0, 2 * width, COLUMNS):
        i = first + at  # feature i; behind the last one: code 0
        value = tl.load(x + row * features + i, mask=i < features, other=0).to(tl.float32)
        place = tl.div_rn(value, s)
        if SHIFTED:
            place += tl.load(zero).to(tl.float32)
        lost |= ((place != place) & (i < features)).to(tl.int32)
        place = tl.where((place == place) & (i < features), place, 0.0)
        place = tl.minimum(tl.maximum(place, -most), most - 1)
        # Ties to even: 1.5 * 2 ** 23 leaves no place for a fraction.
        code = ((place + 12582912.0) - 12582912.0).to(tl.int8)
        tl.store(codes + row * 2 * width + i % 2 * width + i // 2, code, mask=i < 2 * width)
    tl.store(scale + row, tl.where(tl.max(lost, 0) > 0, float("nan"), s))


@triton.jit
def linear_kernel(
    codes: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    zero: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    features: tl.tensor,
    outputs: tl.tensor,
    width: tl.tensor,
    GROUPS: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """ROWS x OUTPUTS of y; a group of features after the other, BYTES of the weight at a time."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS).to(tl.int64)
    is_row, is_output = t < rows, o < outputs
    even = codes + t[:, None] * 2 * width
    size = features // GROUPS
    out = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for group in range(GROUPS):
        sums = tl.zeros([ROWS, OUTPUTS], tl.int32)
        ones = tl.zeros([OUTPUTS], tl.int32)
        start = group * size
        end = start + size
        for first in range(start // 2, (end + 1) // 2, BYTES):
            k = first + tl.arange(0, BYTES)
            there = k < width
            w = tl.load(
                weight + o[None, :] * width + k[:, None],
                mask=there[:, None] & is_output[None, :],
                other=0,
            )
            # A byte may hold a feature of the next group: its code is 0 here.
            is_low = (2 * k >= start) & (2 * k < end)
            is_high = (2 * k + 1 >= start) & (2 * k + 1 < end)
            low = tl.where(is_low[:, None], (w & 15).to(tl.int8) - 8, 0).to(tl.int8)
            high = tl.where(is_high[:, None], (w >> 4).to(tl.int8) - 8, 0).to(tl.int8)
            mine = is_row[:, None] & there[None, :]
            x_low = tl.load(even + k[None, :], mask=mine, other=0)
            x_high = tl.load(even + width + k[None, :], mask=mine, other=0)
            sums = tl.dot(x_low, low, sums, out_dtype=tl.int32)
            sums = tl.dot(x_high, high, sums, out_dtype=tl.int32)
            if SHIFTED:
                ones += tl.sum(low.to(tl.int32) + high.to(tl.int32), 0)
        value = sums.to(tl.float32)
        if SHIFTED:
            value -= (tl.load(zero).to(tl.float32) * ones.to(tl.float32))[None, :]
        of_group = tl.load(weight_scale + o * GROUPS + group, mask=is_output, other=0)
        out += value * of_group.to(tl.float32)[None, :]
    out *= tl.load(scale + t, mask=is_row, other=0)[:, None]
    if BIASED:
        out += tl.load(bias + o, mask=is_output, other=0).to(tl.float32)[None, :]
    place = y + t[:, None] * outputs + o[None, :]
    tl.store(place, out.to(y.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


def w4a4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    """:func:`torch_plugins.ops.int4.w4a4_linear`; products and sums are not fused, as there."""
    check(x, weight, weight_scale, bias, input_bits)
    with torch.cuda.device_of(x):
        return launch(x, weight, weight_scale, input_scale, input_zero_point, bias, input_bits)


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    """The two kernels, on the current GPU."""
    features, (outputs, width) = x.shape[-1], weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    rows = y.numel() // outputs if outputs else 0
    if rows == 0:
        return y
    x, weight, weight_scale = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    codes = x.new_empty((rows, 2, width), dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    given, shifted = input_scale is not None, input_zero_point is not None
    quantize_kernel[(rows,)](
        x,
        input_scale,
        input_zero_point,
        codes,
        scale,
        features,
        width,
        BITS=input_bits,
        GIVEN=given,
        SHIFTED=shifted,
        COLUMNS=COLUMNS,
        enable_fp_fusion=False,
    )
    few = rows <= 16
    tile = {"ROWS": 16 if few else 64, "OUTPUTS": 64, "BYTES": 64}
    grid = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(outputs, tile["OUTPUTS"])
    linear_kernel[grid](
        codes,
        scale,
        weight,
        weight_scale,
        input_zero_point,
        bias if bias is None else bias.contiguous(),
        y,
        rows,
        features,
        outputs,
        width,
        GROUPS=weight_scale.shape[1],
        SHIFTED=shifted,
        BIASED=bias is not None,
        **tile,
        enable_fp_fusion=False,
    )
    return y


def check(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_bits: int
) -> None:
    """Raises RuntimeError where the shapes do not fit each other."""
    outputs, features = weight.shape[0], x.shape[-1]
    if weight.dtype != torch.uint8 or weight.shape[1:] != ((features + 1) // 2,):
        raise RuntimeError(
            f"w4a4_linear: weight is {weight.dtype} {list(weight.shape)}: must be uint8 "
            f"[O, {(features + 1) // 2}]"
        )
    if weight_scale.dim() != 2 or weight_scale.shape[0] != outputs:
        raise RuntimeError(
            f"w4a4_linear: weight_scale has the shape {list(weight_scale.shape)}: must be "
            f"[{outputs}, G]"
        )
    groups = weight_scale.shape[1]
    if groups < 1 or features % groups:
        raise RuntimeError(
            f"w4a4_linear: weight_scale has {groups} columns: their number, that of groups, must "
            f"divide the {features} input features"
        )
    if bias is not None and bias.shape != (outputs,):
        raise RuntimeError(
            f"w4a4_linear: bias has the shape {list(bias.shape)}: must be [{outputs}]"
        )
    if not 2 <= input_bits <= 8:
        raise RuntimeError(f"w4a4_linear: input_bits is {input_bits}: must be 2 to 8")
