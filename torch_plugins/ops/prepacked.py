"""Four-bit weights in the order in which CPUs read them, see :mod:`torch_plugins.ops.int4`.

The bytes of a weight ``[O, I]`` with G groups, little-endian, with blocks of 16 rows and steps of
eight features of a group::

    header   64 bytes: "TPW4", version (uint32), O, I, G (int64), zeros
    scales   fp32  [ceil(O / 16), G, 16]
    sums     int32 [ceil(O / 16), G, 16]                      of the codes of a group
    tiles    uint8 [ceil(O / 16), G, ceil(I / G / 8), 16, 4]  feature c of a step in the low half,
                                                              c + 4 in the high half, as code + 8

with scale 0 and code 0 where a block has no such row, and code 0 where a step has no such feature.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .inference import define, refuse_gradient
from .int4 import LOWEST, pack_int4, unpack_int4, w4a4_linear_reference

MAGIC, VERSION = b"TPW4", 1
HEADER, BLOCK, STEP = 64, 16, 8


def prepacked_bytes(out_features: int, in_features: int, groups: int) -> int:
    """The size of a prepacked weight."""
    blocks, steps = -(-out_features // BLOCK), -(-(in_features // groups) // STEP)
    return HEADER + blocks * groups * BLOCK * (8 + steps * STEP // 2)


def prepack_w4_reference(weight: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """:func:`prepack_w4` by torch's own operators."""
    _check_plain(weight, weight_scale, in_features)
    (rows, groups), size = weight_scale.shape, in_features // weight_scale.shape[1]
    blocks, steps = -(-rows // BLOCK), -(-size // STEP)
    codes = weight.new_full((blocks * BLOCK, groups, steps * STEP), -LOWEST)
    codes[:rows, :, :size] = (unpack_int4(weight, in_features) - LOWEST).view(rows, groups, size)
    by_step = codes.view(blocks, BLOCK, groups, steps, 2, 4).permute(0, 2, 3, 1, 5, 4)
    tiles = by_step[..., 0] | by_step[..., 1] << 4
    scales = weight_scale.new_zeros((blocks * BLOCK, groups), dtype=torch.float32)
    scales[:rows] = weight_scale.float()
    sums = codes.sum(-1, dtype=torch.int32) + LOWEST * steps * STEP
    header = struct.pack("<4sI3q32x", MAGIC, VERSION, rows, in_features, groups)
    parts = [torch.frombuffer(bytearray(header), dtype=torch.uint8).to(weight.device)]
    for of_rows in (scales, sums):
        by_block = of_rows.view(blocks, BLOCK, groups).transpose(1, 2).contiguous()
        parts.append(by_block.flatten().view(torch.uint8))
    return torch.cat([*parts, tiles.flatten()])


def _check_plain(weight: Tensor, weight_scale: Tensor, in_features: int) -> None:
    if weight.dim() != 2 or weight.shape[1] != (in_features + 1) // 2:
        raise RuntimeError(
            f"prepack_w4: weight has the shape {list(weight.shape)}: must be [O, ceil(I / 2)] with "
            f"I = in_features = {in_features}"
        )
    if weight_scale.dim() != 2 or weight_scale.shape[0] != weight.shape[0]:
        raise RuntimeError(
            f"prepack_w4: weight_scale has the shape {list(weight_scale.shape)}: must be [O, G] "
            f"with O = {weight.shape[0]}"
        )
    groups = weight_scale.shape[1]
    if groups < 1 or in_features % groups:
        raise RuntimeError(
            f"prepack_w4: weight_scale has {groups} columns: their number, that of groups, must "
            f"divide the {in_features} input features"
        )


def _prepack_w4_fake(weight: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    size = prepacked_bytes(weight.shape[0], in_features, weight_scale.shape[1])
    return weight.new_empty((size,))


_prepack_w4 = define("prepack_w4", prepack_w4_reference, _prepack_w4_fake)


def prepack_w4(weight: Tensor, weight_scale: Tensor, in_features: int | None = None) -> Tensor:
    """A weight in one run of bytes, for :func:`w4a4_linear_prepacked`.

    Args:
        weight: ``[O, ceil(I / 2)]``, as :func:`~torch_plugins.ops.int4.pack_int4` makes it.
        weight_scale: ``[O, G]``; G divides I.
        in_features: I; None: even.
    """
    out: Tensor = _prepack_w4(
        weight, weight_scale, 2 * weight.shape[-1] if in_features is None else in_features
    )
    return out


def unprepack_w4(prepacked: Tensor) -> tuple[Tensor, Tensor, int]:
    """The weight, its scales in fp32, and I, as :func:`prepack_w4` was given them.

    Raises:
        RuntimeError: not a prepacked weight, damaged, or of another version of the format.
    """
    rows, columns, groups = sizes(prepacked)
    size = columns // groups
    blocks, steps = -(-rows // BLOCK), -(-size // STEP)
    span = blocks * groups * BLOCK * 4
    # Views as fp32 want memory of their own where these bytes are a slice at an odd place.
    scales = prepacked[HEADER : HEADER + span].clone().view(torch.float32)
    scale = scales.view(blocks, groups, BLOCK).transpose(1, 2).reshape(-1, groups)[:rows]
    tiles = prepacked[HEADER + 2 * span :].view(blocks, groups, steps, BLOCK, 4)
    halves = torch.stack((tiles & 15, tiles >> 4), -2)  # [blocks, groups, steps, BLOCK, 2, 4]
    by_row = halves.permute(0, 3, 1, 2, 4, 5).reshape(-1, groups, steps * STEP)
    codes = by_row[:rows, :, :size].reshape(rows, columns).to(torch.int8) + LOWEST
    return pack_int4(codes), scale.contiguous(), columns


def sizes(prepacked: Tensor, name: str = "prepacked") -> tuple[int, int, int]:
    """O, I and G; raises as :func:`unprepack_w4`."""
    if prepacked.dtype != torch.uint8 or prepacked.dim() != 1:
        raise RuntimeError(f"{name} is not a prepacked weight: make it with prepack_w4")
    header = bytes(prepacked[:HEADER].tolist())
    if len(header) < HEADER or not header.startswith(MAGIC):
        raise RuntimeError(f"{name} is not a prepacked weight: make it with prepack_w4")
    _, version, rows, columns, groups = struct.unpack("<4sI3q32x", header)
    if version != VERSION:
        raise RuntimeError(
            f"{name} has the format {version}, and this library reads {VERSION}: make it anew with "
            "prepack_w4"
        )
    whole = rows >= 0 and groups >= 1 and columns >= 0 and columns % groups == 0
    if not whole or prepacked_bytes(rows, columns, groups) != prepacked.numel():
        raise RuntimeError(
            f"{name} is damaged: {prepacked.numel()} bytes do not hold {rows} x {columns} in "
            f"{groups} groups"
        )
    return rows, columns, groups


def w4a4_linear_prepacked_reference(
    x: Tensor,
    prepacked: Tensor,
    out_features: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    """:func:`w4a4_linear_prepacked` by torch's own operators."""
    rows, columns, _ = sizes(prepacked)
    if (rows, columns) != (out_features, x.shape[-1]):
        raise RuntimeError(
            f"w4a4_linear_prepacked: prepacked is a weight of {rows} x {columns}, and the other "
            f"arguments are for {out_features} x {x.shape[-1]}"
        )
    weight, scale, _ = unprepack_w4(prepacked)
    return w4a4_linear_reference(x, weight, scale, input_scale, input_zero_point, bias, input_bits)


def _w4a4_linear_prepacked_fake(
    x: Tensor,
    prepacked: Tensor,
    out_features: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_w4a4_linear_prepacked = define(
    "w4a4_linear_prepacked", w4a4_linear_prepacked_reference, _w4a4_linear_prepacked_fake
)


def w4a4_linear_prepacked(
    x: Tensor,
    prepacked: Tensor,
    out_features: int,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    input_bits: int = 4,
) -> Tensor:
    """:func:`~torch_plugins.ops.int4.w4a4_linear` by a weight of :func:`prepack_w4`.

    Args:
        out_features: O.

    Raises:
        RuntimeError: ``prepacked`` is for other sizes, damaged, or of another version; or
            ``x`` wants a gradient.
    """
    refuse_gradient("w4a4_linear_prepacked", x)
    out: Tensor = _w4a4_linear_prepacked(
        x, prepacked, out_features, input_scale, input_zero_point, bias, input_bits
    )
    return out
