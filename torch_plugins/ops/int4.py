"""Four-bit weights in memory, and the linear layer that multiplies them by four-bit activations.

*Storage.* A weight of codes -8 to 7, ``[O, I]``, is bytes ``[O, ceil(I / 2)]``: input feature 2k is
in the low half of byte k, 2k + 1 in the high half, each as ``code + 8``. Four bytes are the
``int32`` of compressed-tensors' ``weight_packed`` on little-endian machines. Where I is odd, the
last half byte is 0 and belongs to nothing.

*Linear layer*, with codes X of the input and W of the weight, groups g of I / G neighbouring input
features, scales s and the input's zero point z, which need not be an integer::

    X[t, i] = round(clamp(x[t, i] / s_x + z, -2 ** (b - 1), 2 ** (b - 1) - 1))
    A[t, o, g] = sum over i in g of X[t, i] W[o, i]                      int32, exact
    y[t, o] = s_x sum over g of s_w[o, g] (A[t, o, g] - z sum over i in g of W[o, i]) + bias[o]

s_x and z are those of the layer; or, without, ``s_x = 2 max|x[t]| / (2 ** b - 1)`` for each token
(1 where that is 0) and z = 0. Everything but A is computed in fp32, x / s_x by division: the
largest feature of a token lies half way between two codes, and a product with 1 / s_x may round
otherwise. A token with NaN, or one with an infinite feature whose scale is its own, gives NaN.

*Prepacked.* ``prepack_w4`` brings a weight, once, into the order in which CPUs read it, as
:mod:`torch_plugins.ops.prepacked` draws it. :func:`w4a4_linear` itself does so in every call on a
CPU, and reads plain storage on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton
from .inference import define, refuse_gradient

LOWEST = -8


@torch.library.custom_op("torch_plugins::pack_int4", mutates_args=())
def _pack_int4(codes: Tensor) -> Tensor:
    halves = (codes - LOWEST).to(torch.uint8)
    if halves.shape[-1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    return halves[..., ::2] | halves[..., 1::2] << 4


@_pack_int4.register_fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] + 1) // 2), dtype=torch.uint8)


@torch.library.custom_op("torch_plugins::unpack_int4", mutates_args=())
def _unpack_int4(packed: Tensor, columns: int) -> Tensor:
    halves = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return (halves[..., :columns].to(torch.int8) + LOWEST).contiguous()


@_unpack_int4.register_fake
def _(packed: Tensor, columns: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], columns), dtype=torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -8 to 7 (int8, ``[..., I]``) as bytes ``[..., ceil(I / 2)]`` (uint8)."""
    out: Tensor = _pack_int4(codes)
    return out


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The codes again: int8 ``[..., columns]``."""
    out: Tensor = _unpack_int4(packed, columns)
    return out


def w4a4_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    """:func:`w4a4_linear` by torch's own operators."""
    codes_x, scale, zero = _input_codes(x, input_scale, input_zero_point, input_bits)
    groups = weight_scale.shape[1]
    # Integers this small are exact in fp64, whatever the order of the sum.
    codes_x = codes_x.double().unflatten(-1, (groups, -1))
    codes_w = unpack_int4(weight, x.shape[-1]).double().unflatten(-1, (groups, -1))
    out = x.new_zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
    for group in range(groups):
        sums = (codes_x[..., group, :] @ codes_w[:, group].T).float()
        if zero is not None:
            sums = sums - zero * codes_w[:, group].sum(-1).float()
        out = out + sums * weight_scale[:, group].float()
    out = out * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _w4a4_linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_w4a4_linear = define("w4a4_linear", w4a4_linear_reference, _w4a4_linear_fake)


def _input_codes(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes as whole numbers in fp32, scale and zero point."""
    wide = x.float()
    if scale is None:
        scale = 2 * wide.abs().amax(-1, keepdim=True) / (2**bits - 1)
        scale = torch.where(scale == 0, 1, scale)
    places = wide / scale.float()
    if zero is not None:
        zero = zero.float()
        places = places + zero
    most = 2 ** (bits - 1)
    return places.clamp(-most, most - 1).round(), scale.float(), zero


def w4a4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    input_bits: int = 4,
) -> Tensor:
    """``y`` above, ``[..., O]`` in the dtype of ``x``; has no gradient.

    Args:
        x: ``[..., I]``.
        weight: bytes ``[O, ceil(I / 2)]``, as :func:`pack_int4` makes them.
        weight_scale: ``[O, G]``; G divides I.
        input_scale: one element; None: one for each token.
        input_zero_point: one element; None: 0.
        bias: ``[O]``.
        input_bits: 2 to 8.

    Raises:
        RuntimeError: an argument does not fit the others, or ``x`` wants a gradient.
    """
    refuse_gradient("w4a4_linear", x)
    out: Tensor = _w4a4_linear(
        x, weight, weight_scale, input_scale, input_zero_point, bias, input_bits
    )
    return out


def w4a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`w4a4_linear` with eight bits of input: on a CPU at the same price."""
    return w4a4_linear(x, weight, weight_scale, input_scale, input_zero_point, bias, 8)


triton.register()
