"""Fake quantization in native code: bit for bit what its reference computes."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.activations import DTYPES, LAYOUTS, SHAPES, close, draw, laid_out, same, strides
from tests.csrc.conftest import EXAMPLES
from torch_plugins.ops.fake_quant import (
    fake_quant,
    fake_quant_backward_reference,
    fake_quant_reference,
)

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.torch_plugins
ODD = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.3, -0.7, 3e38, -3e38, 1e-40]
"""Infinite, no number, signed zeros, on the clips, near overflow, subnormal."""


def clips(high=1.3, low=-0.7, dtype=torch.float32, shape=(1,)):
    return (torch.full(shape, value, dtype=dtype) for value in (high, low))


def compare(x, g, high, low, bits):
    """Values, layout and gradients."""
    found, expected = OPS.fake_quant(x, high, low, bits), fake_quant_reference(x, high, low, bits)
    same(found, expected)
    assert strides(found) == strides(torch.empty_like(x))
    found = OPS.fake_quant_backward(g, x, high, low, bits)
    expected = fake_quant_backward_reference(g, x, high, low, bits)
    same(found[0], expected[0])
    assert strides(found[0]) == strides(torch.empty_like(x))
    size = g.double().abs().nan_to_num(0, 0, 0).sum().item()
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.shape == theirs.shape
        close(mine, theirs, atol=size * 1e-6 + 1e-30)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    clip_dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from((1, 2, 3, 4, 5, 8, 16, 30)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    ends=st.tuples(st.floats(0.1, 3), st.floats(-3, 0))
    | st.sampled_from([(2.0, 1.0), (1e-3, -1e4), (0.5, 0.5), (-1.0, 1.0)]),
    seed=st.integers(0, 99),
)
def test_what_the_reference_computes(shape, dtype, clip_dtype, bits, layouts, ends, seed):
    """Clips that are equal or in the wrong order included."""
    x, g = (laid_out(draw(shape, dtype, seed + i), how) for i, how in enumerate(layouts))
    compare(x, g, *clips(*ends, clip_dtype, (1,) if seed % 2 else ()), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_have_the_last_bit_of_the_reference(dtype):
    """Which a step that is computed otherwise has for most clips, but not for all."""
    x = draw((100,), dtype, spread=2.0)
    for seed in range(60):
        high, low = draw((2,), dtype, seed).sort(descending=True)[0].unbind()
        bits = 1 + seed % 8
        same(OPS.fake_quant(x, high, low, bits), fake_quant_reference(x, high, low, bits))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_of_memory(layout, dtype):
    x, g = draw((3, 5, 33), dtype), draw((3, 5, 33), dtype, 1)
    compare(laid_out(x, layout), g, *clips(), 4)
    compare(x, laid_out(g, layout), *clips(), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "ends",
    [
        (1.3, -0.7),
        (0.0, -0.0),
        (torch.nan, -1.0),
        (torch.inf, -torch.inf),
        (1.0, -torch.inf),
        (1e-45, -1e-45),
        (3e38, -3e38),
    ],
)
def test_values_and_clips_that_are_no_usual_numbers(dtype, bits, ends):
    x = torch.tensor(ODD * 7, dtype=dtype)
    g = torch.ones_like(x)
    high, low = clips(*ends)
    same(OPS.fake_quant(x, high, low, bits), fake_quant_reference(x, high, low, bits))
    found = OPS.fake_quant_backward(g, x, high, low, bits)
    expected = fake_quant_backward_reference(g, x, high, low, bits)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs)


def test_elements_beyond_the_end_take_no_part():
    """They would be 0, between these clips, and infinitely many steps from them."""
    x = torch.full((3,), 2.0)
    _, d_high, d_low = OPS.fake_quant_backward(x, x, *clips(1e-45, -1e-45), 4)
    assert (d_high.item(), d_low.item()) == (6, 0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_gradients_that_are_no_numbers(value):
    x, g = draw((50,), torch.float32), draw((50,), torch.float32, 1)
    for place in (x.argmax(), x.argmin(), x.abs().argmin()):
        odd = g.clone()
        odd[place] = value
        found = OPS.fake_quant_backward(odd, x, *clips(), 4)
        expected = fake_quant_backward_reference(odd, x, *clips(), 4)
        for mine, theirs in zip(found, expected, strict=True):
            close(mine, theirs)


def test_no_kind_of_nan_turns_into_a_number():
    odd = torch.frombuffer(bytearray(struct.pack("<I", 0x7FFFFFFF)), dtype=torch.float32)
    high, x = torch.tensor([1.3]), draw((100,), torch.bfloat16)
    assert OPS.fake_quant(x, high, odd, 8).isnan().all()
    assert OPS.fake_quant(x, odd, high, 4).isnan().all()


def test_larger_than_the_caches(threads):
    """Whole vectors, and an end that is none."""
    threads(2)
    high, low = clips()
    x = draw((1001,), torch.bfloat16).repeat(2**24 // 1001 + 1)
    out = OPS.fake_quant(x, high, low, 4)
    same(out, fake_quant_reference(x, high, low, 4))
    dx = OPS.fake_quant_backward(x, x, high, low, 4)[0]
    same(dx, torch.where((x.float() > low) & (x.float() < high), x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype, threads):
    x, g = draw((129, 1000), dtype), draw((129, 1000), dtype, 1)
    found = []
    for count in (1, 2, 3):
        threads(count)
        backward = OPS.fake_quant_backward(g, x, *clips(), 4)
        found.append((OPS.fake_quant(x, *clips(), 4), *backward))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_of_clips_of_a_million_values():
    """Terms in fp32, and sums as good as those in fp64."""
    x, g = draw((1_000_003,), torch.float32), draw((1_000_003,), torch.float32, 1)
    high, low = clips()
    place = (x - low) * (1 / (high - low) * 15)
    rounding = ((place - place.round()) * g)[(x > low) & (x < high)].double().sum().item() / 15
    above, below = (g[where].double().sum().item() for where in (x >= high, x <= low))
    _, d_high, d_low = OPS.fake_quant_backward(g, x, high, low, 4)
    assert d_high.item() == pytest.approx(above - rounding, abs=1e-3)
    assert d_low.item() == pytest.approx(below + rounding, abs=1e-3)


def test_wrong_input_is_named():
    x, (high, low) = draw((3, 8), torch.float32), clips()
    with pytest.raises(RuntimeError, match=r"fake_quant: x is int64: must be float32 or bfloat16"):
        OPS.fake_quant(x.long(), high, low, 4)
    with pytest.raises(RuntimeError, match=r"clip_low has the shape \[2\]: must be one element"):
        OPS.fake_quant(x, high, torch.zeros(2), 4)
    with pytest.raises(RuntimeError, match="clip_high is int64: must be floating point"):
        OPS.fake_quant(x, torch.tensor(3), low, 4)
    with pytest.raises(RuntimeError, match="bits is 0: must be 1 to 31"):
        OPS.fake_quant(x, high, low, 0)
    with pytest.raises(RuntimeError, match=r"gradient has the shape \[3, 7\]: must be \[3, 8\]"):
        OPS.fake_quant_backward(x[:, :7], x, high, low, 4)
    with pytest.raises(RuntimeError, match="gradient is float64: must be float32"):
        OPS.fake_quant_backward(x.double(), x, high, low, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conventions_of_torch(dtype):
    high, low = (clip.requires_grad_() for clip in clips(dtype=torch.float64))
    for x in (draw((3, 8), dtype), draw((8, 3), dtype).T):
        x = x.detach().requires_grad_()
        torch.library.opcheck(OPS.fake_quant.default, (x, high, low, 4))
        arguments = (x.detach(), x.detach(), high.detach(), low.detach(), 4)
        torch.library.opcheck(OPS.fake_quant_backward.default, arguments)


def test_compiled_graphs_give_the_same():
    def step(x, high, low):
        return fake_quant(x * 2, high, low).sin()

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (step, compiled):
        inputs = [t.requires_grad_() for t in (draw((5, 33), torch.float32), *clips())]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), results[0][0])


def test_a_gradient_is_found_only_where_one_is_wanted():
    x, (high, low) = draw((3, 8), torch.float32), clips()
    assert fake_quant(x, high, low).grad_fn is None
    assert fake_quant(x, high.requires_grad_(), low).grad_fn is not None
    with torch.no_grad():
        assert fake_quant(x, high, low).grad_fn is None
