"""Four-bit linear layers in native code: bit for bit what their references compute."""

import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.conftest import EXAMPLES
from torch_plugins.ops.int4 import pack_int4, w4a4_linear, w4a4_linear_reference, w4a8_linear
from torch_plugins.ops.prepacked import (
    VERSION,
    prepack_w4,
    prepack_w4_reference,
    prepacked_bytes,
    unprepack_w4,
    w4a4_linear_prepacked,
    w4a4_linear_prepacked_reference,
)

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.torch_plugins
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(rows, columns, groups=1, seed=0):
    """A plain weight and its scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    return pack_int4(codes), torch.rand(rows, groups, generator=generator) + 0.1


def inputs(*shape, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if x.numel() > 3:
        x.view(-1)[::7] *= 20  # features that stand out
    return x.to(dtype)


def both(x, weight, scale, *rest, bits=4):
    """The same from plain and from prepacked storage, compared with the reference."""
    expected = w4a4_linear_reference(x, weight, scale, *rest, bits)
    plain = w4a4_linear(x, weight, scale, *rest, bits)
    prepacked = prepack_w4(weight, scale, x.shape[-1])
    for out in (plain, w4a4_linear_prepacked(x, prepacked, len(scale), *rest, bits)):
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return plain


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(0, 40),
    out=st.integers(1, 70),
    size=st.integers(1, 75),
    groups=st.integers(1, 4),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(("token", "scale", "zero point")),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(rows, out, size, groups, bits, dtype, kind, with_bias, seed):
    weight, scale = draw(out, size * groups, groups, seed)
    x = inputs(rows, size * groups, seed=seed, dtype=dtype)
    static = None if kind == "token" else torch.tensor([0.37])
    zero = torch.tensor([-1.63]) if kind == "zero point" else None
    bias = inputs(out, seed=seed + 1) if with_bias else None
    both(x, weight, scale, static, zero, bias, bits=bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "out", "columns", "groups"), [(130, 200, 1024, 8), (1, 33, 4097, 1)]
)
def test_equals_the_reference_where_chunks_strips_and_tiles_end(rows, out, columns, groups, dtype):
    both(inputs(rows, columns, dtype=dtype), *draw(out, columns, groups), None, None, None)


@pytest.mark.parametrize("groups", [1, 2])
def test_no_rows_columns_or_features(groups):
    weight, scale = draw(5, 8, groups)
    assert both(inputs(0, 8), weight, scale, None, None, None).shape == (0, 5)
    assert both(inputs(2, 0, 8), weight, scale, None, None, None).shape == (2, 0, 5)
    none = torch.zeros(0, 4, dtype=torch.uint8), torch.ones(0, groups)
    assert both(inputs(3, 8), *none, None, None, None).shape == (3, 0)
    empty = torch.zeros(5, 0, dtype=torch.uint8), torch.ones(5, 1)
    bias = inputs(5)
    assert torch.equal(w4a4_linear(torch.zeros(3, 0), *empty, None, None, bias), bias.expand(3, 5))


def test_any_layout_of_memory():
    weight, scale = draw(24, 30, 3)
    wide = inputs(30, 9, 2)
    x = wide.permute(1, 2, 0)
    expected = both(x.contiguous(), weight, scale, None, None, None)
    assert torch.equal(w4a4_linear(x, weight, scale), expected)
    every_second = inputs(9, 60)[:, ::2]
    strided = torch.stack((weight, weight), -1).flatten(1)[:, ::2]
    both(every_second, strided, scale.t().contiguous().t(), None, None, inputs(48)[::2])
    both(inputs(1, 30).expand(7, 30), weight, scale, None, None, None)
    assert both(inputs(30), weight, scale, None, None, None).shape == (24,)
    # Bytes at any address.
    moved = torch.cat((torch.zeros(3, dtype=torch.uint8), prepack_w4(weight, scale)))[3:]
    assert torch.equal(w4a4_linear_prepacked(x, moved, 24), expected)


def test_what_is_not_finite():
    """A token's own scale makes all of it NaN; under a fixed scale infinity is the last code."""
    weight, scale = draw(20, 16)
    x = inputs(5, 16)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    out = both(x, weight, scale, None, None, None)
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()
    out = both(x, weight, scale, torch.tensor([0.5]), torch.tensor([0.25]), None)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
    both(torch.full((3, 16), 3e38), weight, scale, None, None, None)
    both(torch.full((3, 16), 1e-42), weight, scale, None, None, None)


@pytest.mark.parametrize("columns", [2**20, 2**20 + 8])
def test_sums_stay_within_32_bits(columns):
    """Up to 2 ** 20 features of the largest codes; above, more groups are asked for."""
    weight = torch.full((1, columns // 2), 0xFF, dtype=torch.uint8)  # code 7
    x, scale = torch.full((1, columns), 500.0), torch.ones(1, 1)
    one = torch.tensor([1.0])
    if columns > 2**20:
        with pytest.raises(RuntimeError, match=r"groups of 1048584 features: at most 2 \*\* 20"):
            w4a4_linear(x, weight, scale, one, None, None, 8)
    else:
        for sign, code in ((1, 127), (-1, -128)):
            out = w4a4_linear(sign * x, weight, scale, one, None, None, 8)
            assert out.item() == 7 * code * columns


def test_eight_bits_of_input():
    weight, scale = draw(20, 32)
    x = inputs(3, 32)
    assert torch.equal(
        w4a8_linear(x, weight, scale), both(x, weight, scale, None, None, None, bits=8)
    )


def test_neither_threads_nor_neighbours_change_a_result(threads):
    weight, scale = draw(512, 256, 2)
    x, prepacked = inputs(97, 256), prepack_w4(weight, scale)
    threads(1)
    alone = w4a4_linear_prepacked(x, prepacked, 512)
    threads(2)
    assert torch.equal(w4a4_linear_prepacked(x, prepacked, 512), alone)
    for rows in (1, 2, 5, 13, 96):
        assert torch.equal(w4a4_linear_prepacked(x[:rows], prepacked, 512), alone[:rows])
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(w4a4_linear_prepacked, x, prepacked, 512) for _ in range(16)]
        assert all(torch.equal(call.result(), alone) for call in calls)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 50), st.integers(1, 70), st.integers(1, 4), st.integers(0, 2**31))
def test_prepacked_weights_come_back(rows, size, groups, seed):
    weight, scale = draw(rows, size * groups, groups, seed)
    prepacked = prepack_w4(weight, scale, size * groups)
    assert torch.equal(prepacked, prepack_w4_reference(weight, scale, size * groups))
    assert prepacked.shape == (prepacked_bytes(rows, size * groups, groups),)
    back, scales, columns = unprepack_w4(prepacked)
    assert torch.equal(back, weight)
    assert torch.equal(scales, scale)
    assert columns == size * groups


FORMAT = [
    (slice(0, 1), b"X", "is not a prepacked weight: make it with prepack_w4"),
    (slice(4, 8), struct.pack("<I", VERSION + 1), "has the format 2, and this library reads 1"),
    (slice(24, 32), struct.pack("<q", 2), "is damaged: .* do not hold 20 x 16 in 2 groups"),
    (slice(24, 32), struct.pack("<q", 0), "is damaged"),
    (slice(24, 32), struct.pack("<q", 2**62), "is damaged"),
]


@pytest.mark.parametrize(("where", "what", "message"), FORMAT, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("run", [OPS.w4a4_linear_prepacked, w4a4_linear_prepacked_reference])
def test_damaged_weights_are_refused(where, what, message, run):
    prepacked = prepack_w4(*draw(20, 16))
    prepacked[where] = torch.tensor(list(what), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        run(inputs(2, 16), prepacked, 20, None, None, None, 4)


@pytest.mark.parametrize("cut", [0, 63, 64, 500])
@pytest.mark.parametrize("run", [OPS.w4a4_linear_prepacked, w4a4_linear_prepacked_reference])
def test_part_of_a_weight_is_refused(cut, run):
    prepacked = prepack_w4(*draw(40, 16))[:cut].clone()
    with pytest.raises(RuntimeError, match=r"is damaged|is not a prepacked weight"):
        run(inputs(2, 16), prepacked, 40, None, None, None, 4)


X, (WEIGHT, SCALE) = inputs(2, 16), draw(20, 16)
WRONG = {
    "x is float64: must be float32 or bfloat16 or float16": dict(x=X.double()),
    "x has no dimensions": dict(x=torch.tensor(1.0)),
    r"weight is int8: must be uint8": dict(weight=WEIGHT.to(torch.int8)),
    r"weight has the shape \[1, 20, 8\]: must have 2 dimensions": dict(weight=WEIGHT[None]),
    r"weight has the shape \[20, 7\]: its dimension 1 must be 8": dict(weight=WEIGHT[:, :7]),
    r"weight_scale has the shape \[19, 1\]: its dimension 0 must be 20": dict(scale=SCALE[:19]),
    "weight_scale has 3 columns: .* must divide the 16 input": dict(scale=SCALE.repeat(1, 3)),
    "weight_scale has 0 columns": dict(scale=SCALE[:, :0]),
    r"input_scale has the shape \[2\]: must be one element": dict(input_scale=torch.ones(2)),
    "input_zero_point has the shape": dict(input_scale=torch.ones(1), zero=torch.ones(3)),
    r"bias has the shape \[19\]: its dimension 0 must be 20": dict(bias=torch.ones(19)),
    "input_bits is 9: must be 2 to 8": dict(bits=9),
    "input_bits is 1: must be 2 to 8": dict(bits=1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    given = (
        dict(x=X, weight=WEIGHT, scale=SCALE, input_scale=None, zero=None, bias=None, bits=4)
        | WRONG[message]
    )
    with pytest.raises(RuntimeError, match=f"w4a4_linear: {message}"):
        w4a4_linear(*given.values())


def test_prepacked_weights_of_other_sizes_are_refused():
    prepacked = prepack_w4(WEIGHT, SCALE)
    with pytest.raises(
        RuntimeError, match=r"weight of 20 x 16, and the other arguments .* 20 x 15"
    ):
        w4a4_linear_prepacked(X[:, :15], prepacked, 20)
    with pytest.raises(
        RuntimeError, match=r"weight of 20 x 16, and the other arguments .* 21 x 16"
    ):
        w4a4_linear_prepacked(X, prepacked, 21)
    with pytest.raises(RuntimeError, match="prepacked is int8: must be uint8"):
        w4a4_linear_prepacked(X, prepacked.to(torch.int8), 20)


def test_a_gradient_is_refused():
    x = inputs(2, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="w4a4_linear has no gradient, and x wants one"):
        w4a4_linear(x, WEIGHT, SCALE)
    with torch.no_grad():
        w4a4_linear(x, WEIGHT, SCALE)


def test_conventions_of_operators():
    prepacked = prepack_w4(WEIGHT, SCALE)
    one = torch.ones(1)
    for args in ((None, None, None, 4), (one, one, torch.ones(20), 8)):
        torch.library.opcheck(OPS.w4a4_linear.default, (X, WEIGHT, SCALE, *args))
        torch.library.opcheck(OPS.w4a4_linear_prepacked.default, (X, prepacked, 20, *args))
    torch.library.opcheck(OPS.prepack_w4.default, (WEIGHT, SCALE, 16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    prepacked = prepack_w4(WEIGHT, SCALE)

    def run(x):
        return w4a4_linear_prepacked(torch.relu(x), prepacked, 20) * 2 + w4a4_linear(
            x, WEIGHT, SCALE
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (2, 5):
        assert torch.equal(compiled(inputs(rows, 16)), run(inputs(rows, 16)))
