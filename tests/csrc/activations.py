"""Activations of every shape, dtype and layout, and how close sums in another order come."""

import math

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "offset")
SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 5, 16, 33)), min_size=1, max_size=3).flatmap(
    lambda shape: st.sampled_from((1, 2, 7, 31, 32, 33, 64, 100, 0)).map(lambda d: (*shape[:-1], d))
)
"""Features below and above the widths of vectors, none, one; 0 to 2 dimensions before them."""


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def draw(shape, dtype, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(spread).to(dtype)


def laid_out(x, layout):
    """The same values elsewhere in memory; expanded: the first row everywhere."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        room = x.new_empty((*x.shape[:-1], 2 * x.shape[-1]))
        room[..., ::2] = x
        return room[..., ::2]
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    if layout == "offset":
        room = x.new_empty(x.numel() + 1)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)
    return x


def same(found, expected):
    """Bit for bit, but for the kind of a NaN; of one dtype and shape."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def close(found, expected, rtol=None, atol=None):
    """Within the rounding of the dtype and of sums in another order."""
    assert found.dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    size = expected.double().abs().nan_to_num(0, 0, 0).amax().item() if expected.numel() else 1
    steps = 2 if eps > 1e-5 else 100
    rtol = steps * eps if rtol is None else rtol
    atol = rtol * size if atol is None else atol
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True
    )


def strides(x):
    """Of dimensions in which anything moves."""
    if math.prod(x.shape) == 0:
        return []
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
