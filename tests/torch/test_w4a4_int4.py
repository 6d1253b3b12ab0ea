"""Four-bit storage, and the linear layer on it against integers counted one by one."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_plugins.ops.int4 import pack_int4, unpack_int4, w4a4_linear


def draw(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_come_back(rows, columns, seed):
    codes = draw(rows, columns, seed)
    packed = pack_int4(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_int4(packed, columns), codes)
    words = pack_to_int32(codes, 4)
    assert torch.equal(words.view(torch.uint8)[:, : packed.shape[1]], packed)


def test_low_half_first():
    assert pack_int4(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist() == [[0xF0, 0x08]]


def inputs(tokens=5, columns=24, rows=6, groups=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, columns, generator=generator)
    x[0, 0] = 0
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    return x, draw(rows, columns), scale, torch.randn(rows, generator=generator)


def naive(x, codes, scale, bias, bits, input_scale=None, zero=None):
    """Every product of integers by itself, in Python's numbers."""
    most, (rows, columns) = 2 ** (bits - 1), codes.shape
    out = torch.zeros(*x.shape[:-1], rows, dtype=torch.float64)
    size = columns // scale.shape[1]
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
        token = x[tuple(place)]
        step = 2 * token.abs().max() / (2**bits - 1) if input_scale is None else input_scale
        step = step if step else torch.tensor(1.0)
        shift = 0.0 if zero is None else float(zero)
        # The largest feature lies half way between two codes: fp32 decides between them.
        levels = [min(max(round(float(v / step + shift)), -most), most - 1) for v in token]
        step = float(step)
        for row in range(rows):
            total = 0.0
            for group in range(scale.shape[1]):
                span = range(group * size, (group + 1) * size)
                count = sum(levels[i] * int(codes[row, i]) for i in span)
                moved = shift * sum(int(codes[row, i]) for i in span)
                total += float(scale[row, group]) * (count - moved)
            out[(*place, row)] = step * total + float(bias[row])
    return out


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("step", "zero"), [(None, None), (0.21, None), (0.21, 3.0), (0.21, -2.37)])
def test_a_linear_layer_counts_integers(groups, bits, step, zero):
    x, codes, scale, bias = inputs(groups=groups)
    static = [None if value is None else torch.tensor([value]) for value in (step, zero)]
    out = w4a4_linear(x, pack_int4(codes), scale, *static, bias, bits)
    expected = naive(x, codes, scale, bias, bits, *static)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(out[0, 0], expected[0, 0].float()) or step is not None


def test_narrow_inputs_and_odd_columns():
    x, codes, scale, _ = inputs(columns=9)
    weight = pack_int4(codes)
    out = w4a4_linear(x.bfloat16(), weight, scale)
    assert out.dtype == torch.bfloat16
    wide = w4a4_linear(x.bfloat16().float(), weight, scale)
    assert torch.equal(out, wide.bfloat16())
    assert torch.equal(w4a4_linear(x[0, 1], weight, scale), w4a4_linear(x, weight, scale)[0, 1])


@pytest.mark.parametrize("static", [False, True])
def test_operators_are_declared_truly(static):
    x, codes, scale, bias = inputs(groups=3)
    weight = pack_int4(codes)
    ops = torch.ops.torch_plugins
    torch.library.opcheck(ops.pack_int4, (codes,))
    torch.library.opcheck(ops.unpack_int4, (weight, codes.shape[1]))
    given = [torch.tensor([0.3]), torch.tensor([0.7]), bias] if static else [None] * 3
    torch.library.opcheck(ops.w4a4_linear, (x, weight, scale, *given, 4))


def test_inputs_are_divided_by_their_scale():
    """A token's largest feature, if negative, lies half way between the codes -8 and -7."""
    x = -torch.rand(5000, 1, generator=torch.Generator().manual_seed(0)) - 0.1
    step = 2 * x.abs() / 15
    found = w4a4_linear(x, pack_int4(torch.ones(1, 1, dtype=torch.int8)), torch.ones(1, 1))
    assert torch.equal(found, (x / step).round() * step)
    assert not torch.equal((x / step).round(), (x * (1 / step)).round())
