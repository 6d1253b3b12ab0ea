"""Fake quantization, kurtosis and both at once in ``csrc/cuda``, run by the emulator."""

import pytest
import torch

from tests.csrc.cuda_emulation import KINDS, Emulator, Out, build
from torch_plugins.ops import fake_quant as quantizer
from torch_plugins.ops import fake_quant_kurtosis as both
from torch_plugins.ops import kurtosis as moments
from torch_plugins.ops import residual_add_rms_norm as norm

# Rows and features: a warp for a row, a block for a row, one of each, rows that blocks share.
SHAPES = [(5, 33), (3, 700), (1, 1), (12, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASES = [(shape, DTYPES[i]) for i, shape in enumerate(SHAPES)] + [(SHAPES[1], torch.bfloat16)]
BITS, EPS = 4, 1e-20


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    few = ("fake_quant.cuh", "MOST_BLOCKS = 1024", "MOST_BLOCKS = 5")
    emulator = Emulator(build("memory_bound", tmp_path_factory.mktemp("memory_bound"), [few]))
    yield emulator
    emulator.close()


def inputs(shape, dtype, clips=torch.float32):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    h = torch.randn(shape[0], dtype=wide)
    return x, g, h, torch.tensor(1.5, dtype=clips), torch.tensor(-0.8, dtype=clips)


def close(found, expected):
    """Within the error of sums in another order."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    torch.testing.assert_close(
        found.to(wide),
        expected.to(wide),
        rtol={torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}.get(
            expected.dtype, 1e-4
        ),
        atol=1e-11 if expected.dtype == torch.float64 else 1e-4,
        equal_nan=True,
    )


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_fake_quant(emulator, shape, dtype):
    x, g, _, high, low = inputs(shape, dtype)
    x[0, 0], x.view(-1)[-1] = float("inf"), 1.5
    kinds = KINDS[dtype], KINDS[high.dtype]
    (out,) = emulator.run("fake_quant", x, high, low, Out(shape, dtype), *kinds, x.numel(), BITS)
    assert torch.equal(out, quantizer.fake_quant_reference(x, high, low, BITS))
    outs = Out(shape, dtype), Out(()), Out(())
    found = emulator.run("fake_quant_backward", g, x, high, low, *outs, *kinds, x.numel(), BITS)
    expected = quantizer.fake_quant_backward_reference(g, x, high, low, BITS)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])
    close(found[2], expected[2])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_kurtosis(emulator, shape, dtype):
    y, _, h, *_ = inputs(shape, dtype)
    kinds = KINDS[dtype], 0
    (out,) = emulator.run("kurtosis", y, Out(shape[:1], h.dtype), *kinds, *shape, EPS)
    close(out, moments.kurtosis_reference(y, EPS))
    (dy,) = emulator.run("kurtosis_backward", h, y, Out(shape, dtype), *kinds, *shape, EPS)
    close(dy, moments.kurtosis_backward_reference(h, y, EPS))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_both_at_once(emulator, shape, dtype):
    x, g, h, high, low = inputs(shape, dtype, clips=dtype)
    numbers = KINDS[dtype], KINDS[high.dtype], *shape, BITS, EPS
    outs = Out(shape, dtype), Out(shape[:1], h.dtype)
    found = emulator.run("fake_quant_kurtosis", x, high, low, *outs, *numbers)
    expected = both.fake_quant_kurtosis_reference(x, high, low, BITS, EPS)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])
    outs = Out(shape, dtype), Out((), high.dtype), Out((), high.dtype)
    found = emulator.run("fake_quant_kurtosis_backward", g, h, x, high, low, *outs, *numbers)
    expected = both.fake_quant_kurtosis_backward_reference(g, h, x, high, low, BITS, EPS)
    for of_emulator, of_reference in zip(found, expected, strict=True):
        close(of_emulator, of_reference)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), [*CASES, ((70, 300), torch.bfloat16)])
def test_residual_add_rms_norm(emulator, shape, dtype, weighted):
    residual, update, h, *_ = inputs(shape, dtype)
    weight = torch.rand(shape[1], dtype=torch.float32) if weighted else None
    numbers = KINDS[dtype], 0, *shape, 1e-6
    outs = Out(shape, dtype), Out(shape, dtype), Out(shape[:1], h.dtype)
    found = emulator.run("residual_add_rms_norm", residual, update, weight, *outs, *numbers)
    expected = norm.residual_add_rms_norm_reference(residual, update, weight, 1e-6)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])
    close(found[2], expected[2])

    total, _, rstd = expected
    g_sum = residual if weighted else None
    of_weight = (weight.shape, weight.dtype) if weighted else (0, dtype)
    found = emulator.run(
        "residual_add_rms_norm_backward",
        *(g_sum, update, total, rstd, weight, Out(shape, dtype), Out(*of_weight)),
        *numbers,
    )
    backward = norm.residual_add_rms_norm_backward_reference(g_sum, update, total, rstd, weight)
    close(found[0], backward[0])
    close(found[1], backward[1])


def test_nan_and_nothing(emulator):
    x, _, _, high, low = inputs((1, 40), torch.float32)
    x[0, 3] = torch.nan
    (out,) = emulator.run("fake_quant", x, high, low, Out(x.shape), 0, 0, x.numel(), BITS)
    assert torch.equal(out.isnan(), x.isnan())
    none = torch.empty(0)
    outs = Out((0,)), Out(()), Out(())
    found = emulator.run("fake_quant_backward", none, none, high, low, *outs, 0, 0, 0, BITS)
    assert found[1] == found[2] == 0
    (out,) = emulator.run("kurtosis", none, Out((3,)), 0, 0, 3, 0, EPS)
    assert out.isnan().all()


def test_sums_do_not_depend_on_the_order_of_threads(emulator):
    x, g, _, high, low = inputs((50, 100), torch.float32)
    outs = Out(x.shape), Out(()), Out(())
    arguments = g, x, high, low, *outs, 0, 0, x.numel(), BITS
    found = [emulator.run("fake_quant_backward", *arguments, seed=seed) for seed in range(3)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
