"""Fake quantization and kurtosis: values and gradients against the same maths by autograd."""

import pytest
import torch

from torch_plugins.ops.fake_quant import fake_quant
from torch_plugins.ops.kurtosis import kurtosis

SHAPES = [(7,), (3, 5), (2, 3, 11)]


def clips(high=1.3, low=-0.7, dtype=torch.float64):
    return [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (high, low)]


def straight_through(p):
    return p + (p.round() - p).detach()


def naive(x, high, low, bits):
    """As the formulas have it, differentiated by torch."""
    scale = (2**bits - 1) / (high - low)
    clamped = torch.minimum(torch.maximum(x, low), high)
    return straight_through((clamped - low) * scale) / scale + low


def values(shape, spread=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(spread).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quant_and_all_gradients(shape, bits):
    x = values(shape).requires_grad_()
    weights = values(shape, 2.0).flip(0)
    found, expected = [], []
    for function, into in ((fake_quant, found), (naive, expected)):
        inputs = (x, *clips())
        out = function(*inputs, bits)
        into += [out, *torch.autograd.grad((out * weights).sum(), inputs)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_at_and_beyond_the_clips():
    """A value on a clip moves with it."""
    x = torch.tensor([-2.0, -0.7, 0.1, 1.3, 5.0], dtype=torch.float64, requires_grad=True)
    high, low = clips()
    g = torch.tensor([1.0, 10.0, 0.0, 100.0, 1000.0], dtype=torch.float64)
    (fake_quant(x, high, low) * g).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 0, 0]
    assert high.grad.item() == pytest.approx(1100)
    assert low.grad.item() == pytest.approx(11)


@pytest.mark.parametrize("bits", [1, 4])
def test_levels_range_and_idempotence(bits):
    high, low = (clip.detach() for clip in clips())
    out = fake_quant(values((64, 33), 2.0), high, low, bits)
    assert len(out.unique()) == 2**bits
    assert out.min() == pytest.approx(low.item())
    assert out.max() == pytest.approx(high.item())
    torch.testing.assert_close(fake_quant(out, high, low, bits), out)


def test_a_symmetric_clip_gets_both_gradients():
    x = values((40,), 2.0)
    (clip,) = clips()[:1]
    fake_quant(x, clip, -clip).sum().backward()
    high, low = clips(1.3, -1.3)
    fake_quant(x, high, low).sum().backward()
    assert clip.grad.item() == pytest.approx(high.grad.item() - low.grad.item())


def test_half_precision_adds_up_in_single():
    """4097 gradients of 1: no number of bf16."""
    x = torch.full((4097,), 3.0, dtype=torch.bfloat16, requires_grad=True)
    high, low = clips(dtype=torch.float32)
    out = fake_quant(x, high, low)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert high.grad.item() == 4097


@pytest.mark.parametrize("shape", SHAPES)
def test_kurtosis_and_its_gradient(shape):
    y = values(shape).requires_grad_()
    weights = values(shape[:-1], 2.0)
    z = y - y.mean(-1, keepdim=True)
    expected = (z**4).mean(-1) / ((z**2).mean(-1) ** 2 + 1e-6)
    found = kurtosis(y, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((k * weights).sum(), y)[0] for k in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(200_000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(200_000, generator=generator, dtype=torch.float64)
    one = torch.zeros(1000, dtype=torch.float64)
    one[3] = 50.0
    assert kurtosis(normal).item() == pytest.approx(3, abs=0.05)
    assert kurtosis(uniform).item() == pytest.approx(1.8, abs=0.01)
    assert kurtosis(one).item() == pytest.approx(1000, rel=0.01)


def test_kurtosis_of_half_precision_is_single():
    y = values((4, 256), 20.0, torch.bfloat16).requires_grad_()
    k = kurtosis(y)
    k.sum().backward()
    assert k.dtype == torch.float32
    assert y.grad.dtype == torch.bfloat16
    torch.testing.assert_close(k.double(), kurtosis(y.detach().double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operators_are_registered_as_torch_wants_them(dtype):
    high, low = clips()
    x = values((3, 8), dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.torch_plugins.fake_quant.default, (x, high, low, 4))
    torch.library.opcheck(torch.ops.torch_plugins.kurtosis.default, (x, 1e-6))


def test_whole_graphs_compile():
    """With the backend that runs no compiler."""

    def loss(x, high, low):
        y = fake_quant(x, high, low)
        return y.sum() + kurtosis(y).mean()

    x, (high, low) = values((3, 8)).requires_grad_(), clips()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(x, high, low), (x, high, low))
    theirs = torch.autograd.grad(loss(x, high, low), (x, high, low))
    torch.testing.assert_close(mine, theirs)
