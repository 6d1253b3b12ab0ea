"""Kurtosis in native code, alone and with fake quantization, against the references in fp64."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.activations import DTYPES, LAYOUTS, SHAPES, close, draw, laid_out, same, strides
from tests.csrc.activations import wide as wide_of
from tests.csrc.conftest import EXAMPLES
from torch_plugins.ops.fake_quant import fake_quant_backward_reference, fake_quant_reference
from torch_plugins.ops.fake_quant_kurtosis import (
    fake_quant_kurtosis,
    fake_quant_kurtosis_backward_reference,
)
from torch_plugins.ops.kurtosis import kurtosis, kurtosis_backward_reference, kurtosis_reference

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.torch_plugins
EPS = 1e-20


def clips(dtype=torch.float32):
    return torch.tensor([1.3], dtype=dtype), torch.tensor([-0.7], dtype=dtype)


def inputs(shape, dtype, layouts=("contiguous", "contiguous"), seed=0):
    """x, the gradient of xhat, and that of K, which is wide."""
    x, g = (laid_out(draw(shape, dtype, seed + i), how) for i, how in enumerate(layouts))
    return x, g, draw(shape[:-1], wide_of(dtype), seed + 2)


def exact_k(x):
    return kurtosis_reference(x.double(), EPS).to(wide_of(x.dtype))


def exact_slope(g_k, x):
    return kurtosis_backward_reference(g_k.double(), x.double(), EPS)


def tolerance(x):
    return 1e-11 if x.dtype == torch.float64 else 2e-5


def compare(x, g, g_k, bits):
    """Both operators and both at once: values, layout and gradients."""
    dtype, (high, low) = x.dtype, clips()
    k = OPS.kurtosis(x, EPS)
    assert k.is_contiguous()
    close(k, exact_k(x), tolerance(x))
    dx = OPS.kurtosis_backward(g_k, x, EPS)
    slope = exact_slope(g_k, x)
    close(dx, slope.to(dtype), rtol=max(tolerance(x), 2 * torch.finfo(dtype).eps))
    assert strides(dx) == strides(torch.empty_like(x))

    xhat, again = OPS.fake_quant_kurtosis(x, high, low, bits, EPS)
    same(xhat, fake_quant_reference(x, high, low, bits))
    same(again, k)
    assert strides(xhat) == strides(torch.empty_like(x))
    found = OPS.fake_quant_kurtosis_backward(g, g_k, x, high, low, bits, EPS)
    through, *of_clips = fake_quant_backward_reference(g, x, high, low, bits)
    both = (through.double() + slope).to(dtype)
    close(found[0], both, rtol=max(tolerance(x), 2 * torch.finfo(dtype).eps))
    assert strides(found[0]) == strides(torch.empty_like(x))
    alone = OPS.fake_quant_backward(g, x, high, low, bits)
    for mine, theirs, single in zip(found[1:], of_clips, alone[1:], strict=True):
        close(mine, theirs, atol=g.double().abs().sum().item() * 1e-6 + 1e-30)
        close(mine, single, atol=g.double().abs().sum().item() * 1e-6 + 1e-30)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    shape=SHAPES.filter(lambda shape: shape[-1] != 2),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    bits=st.sampled_from((1, 4, 8)),
    offset=st.sampled_from((0.0, 3.0)),
    seed=st.integers(0, 99),
)
def test_what_the_references_compute(shape, dtype, layouts, bits, offset, seed):
    """Of two features, every kurtosis is 1 and every slope 0 but for rounding: left out."""
    x, g, g_k = inputs(shape, dtype, layouts, seed)
    compare(x + offset if layouts[0] == "contiguous" else x, g, g_k, bits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_of_memory(layout, dtype):
    for layouts in ((layout, "contiguous"), ("contiguous", layout)):
        compare(*inputs((3, 5, 33), dtype, layouts), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [4095, 4096, 4097, 12_345])
def test_long_rows(dtype, d):
    """Sums over blocks of features; means that are far from 0."""
    x, g, g_k = inputs((3, d), dtype)
    x = x + torch.tensor([[0.0], [50.0], [-2.0]], dtype=dtype)
    close(OPS.kurtosis(x, EPS), exact_k(x), rtol=1e-11 if dtype == torch.float64 else 1e-4)
    found = OPS.fake_quant_kurtosis_backward(g, g_k, x, *clips(), 4, EPS)
    expected = fake_quant_kurtosis_backward_reference(g, g_k, x, *clips(), 4, EPS)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, rtol=max(2e-4 * (dtype != torch.float64), 4 * torch.finfo(dtype).eps))


def test_rows_of_one_feature_of_equal_ones_and_of_none():
    """K is 0 where nothing varies and NaN where nothing is."""
    assert OPS.kurtosis(torch.full((3, 1), 2.0), EPS).tolist() == [0, 0, 0]
    assert OPS.kurtosis(torch.full((2, 50), 0.25), EPS).tolist() == [0, 0]
    assert OPS.kurtosis_backward(torch.ones(2), torch.full((2, 50), 0.25), EPS).abs().max() == 0
    assert OPS.kurtosis(torch.ones(2, 0), EPS).isnan().all()
    assert OPS.kurtosis(torch.ones(0, 5), EPS).shape == (0,)
    assert OPS.kurtosis_backward(torch.ones(2), torch.ones(2, 0), EPS).shape == (2, 0)
    assert kurtosis_backward_reference(torch.ones(2), torch.ones(2, 0), EPS).shape == (2, 0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(value, dtype):
    x, g, g_k = inputs((3, 40), dtype)
    x[1] *= 1e-25 if value == 1e-30 else 1
    x[1, 7] = value
    for found, expected in (
        (OPS.kurtosis(x, EPS), kurtosis_reference(x, EPS)),
        (OPS.kurtosis_backward(g_k, x, EPS), kurtosis_backward_reference(g_k, x, EPS)),
    ):
        close(found, expected, rtol=1e-2)
        assert found[[0, 2]].isfinite().all()
    found = OPS.fake_quant_kurtosis_backward(g, g_k, x, *clips(), 4, EPS)
    expected = fake_quant_kurtosis_backward_reference(g, g_k, x, *clips(), 4, EPS)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, rtol=1e-2)


def test_no_kind_of_nan_turns_into_a_number():
    odd = torch.frombuffer(bytearray(struct.pack("<I", 0x7FFFFFFF)), dtype=torch.float32)
    assert OPS.kurtosis_backward(odd, draw((1, 40), torch.bfloat16), EPS).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype, threads):
    x, g, g_k = inputs((257, 600), dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        backward = OPS.fake_quant_kurtosis_backward(g, g_k, x, *clips(), 4, EPS)
        forward = OPS.fake_quant_kurtosis(x, *clips(), 4, EPS)
        found.append((*forward, *backward, OPS.kurtosis_backward(g_k, x, EPS)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_larger_than_the_caches(threads):
    """Rows that start where vectors do, and rows that do not."""
    threads(2)
    for d in (4096, 4100):
        x = draw((64, d), torch.float32).repeat(33, 1)
        g_k, high_low = torch.ones(len(x)), clips()
        xhat, k = OPS.fake_quant_kurtosis(x, *high_low, 4, EPS)
        same(xhat, fake_quant_reference(x, *high_low, 4))
        dx = OPS.fake_quant_kurtosis_backward(x, g_k, x, *high_low, 4, EPS)[0]
        for first in (64, 1024, 2048):
            assert torch.equal(dx[:64], dx[first : first + 64])
            assert torch.equal(k[:64], k[first : first + 64])


def test_gradients_in_double_precision():
    x = draw((3, 11), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kurtosis(x, 1e-6), x)
    high, low = clips(torch.float64)
    assert torch.autograd.gradcheck(lambda x: fake_quant_kurtosis(x, high, low, 4, 1e-6)[1], x)


def test_gradients_of_one_output_alone():
    """Each as that of the operator which has only this output."""
    x, g, g_k = inputs((5, 40), torch.float32)
    leaves = [t.requires_grad_() for t in (x, *clips())]
    xhat, k = fake_quant_kurtosis(*leaves)
    found = torch.autograd.grad(xhat, leaves, g, retain_graph=True)
    for mine, theirs in zip(found, OPS.fake_quant_backward(g, *leaves, 4), strict=True):
        assert torch.equal(mine, theirs)
    of_k = torch.autograd.grad(k, leaves, g_k, retain_graph=True, allow_unused=True)
    assert torch.equal(of_k[0], OPS.kurtosis_backward(g_k, x, EPS))
    assert of_k[1:] == (None, None)
    both = torch.autograd.grad((xhat, k), leaves, (g, g_k))
    close(both[0], found[0] + of_k[0])


def test_wrong_input_is_named():
    x = draw((3, 8), torch.float32)
    with pytest.raises(RuntimeError, match="kurtosis: y has no dimensions"):
        OPS.kurtosis(torch.tensor(1.0), EPS)
    with pytest.raises(RuntimeError, match="kurtosis: y is int64: must be float32"):
        OPS.kurtosis(x.long(), EPS)
    with pytest.raises(RuntimeError, match=r"gradient has the shape \[2\]: must be \[3\]"):
        OPS.kurtosis_backward(torch.ones(2), x, EPS)
    with pytest.raises(RuntimeError, match="gradient is bfloat16: must be float32"):
        OPS.kurtosis_backward(torch.ones(3).bfloat16(), x.bfloat16(), EPS)
    with pytest.raises(RuntimeError, match=r"g_xhat has the shape \[8, 3\]: must be \[3, 8\]"):
        OPS.fake_quant_kurtosis_backward(x.T, torch.ones(3), x, *clips(), 4, EPS)
    with pytest.raises(RuntimeError, match="fake_quant_kurtosis: bits is 40"):
        OPS.fake_quant_kurtosis(x, *clips(), 40, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conventions_of_torch(dtype):
    high, low = (clip.requires_grad_() for clip in clips(torch.float64))
    x, g, g_k = inputs((3, 8), dtype)
    for leaf in (x.clone().requires_grad_(), x.T.clone().T.requires_grad_()):
        torch.library.opcheck(OPS.kurtosis.default, (leaf, EPS))
        torch.library.opcheck(OPS.fake_quant_kurtosis.default, (leaf, high, low, 4, EPS))
    torch.library.opcheck(OPS.kurtosis_backward.default, (g_k, x, EPS))
    arguments = (g, g_k, x, high.detach(), low.detach(), 4, EPS)
    torch.library.opcheck(OPS.fake_quant_kurtosis_backward.default, arguments)


def test_compiled_graphs_give_the_same():
    def step(x, high, low):
        xhat, k = fake_quant_kurtosis(x * 2, high, low)
        return xhat.sin() + (k + kurtosis(x)).unsqueeze(-1)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.requires_grad_() for t in (draw((5, 33), torch.float32), *clips())]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
