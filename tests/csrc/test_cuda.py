"""Operators on a GPU against their references on the CPU: skipped without a GPU.

The kernels are those of the CUDA library, built by ``TORCH_PLUGINS_BUILD=cuda pip install .``;
without it, only ``w4a4_linear`` is tested, in Triton. ``make check-cuda`` also runs these tests by
the emulator: with ``EMULATED``, a library that takes tensors of the CPU for those of a GPU.
"""

import os

import pytest
import torch

from torch_plugins import native
from torch_plugins.ops import fake_quant as quantizer
from torch_plugins.ops import fake_quant_kurtosis as both
from torch_plugins.ops import int4
from torch_plugins.ops import kurtosis as moments
from torch_plugins.ops import residual_add_rms_norm as norm
from torch_plugins.ops import sparse_moe as moe

EMULATED = os.environ.get("EMULATED")
DEVICE = "cpu" if EMULATED else "cuda"
if EMULATED:
    torch.ops.load_library(EMULATED)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not EMULATED and not torch.cuda.is_available(), reason="no GPU here"),
]
needs_library = pytest.mark.skipif(
    not EMULATED and not native.active("cuda"), reason="the library is not built"
)
needs_gpu = pytest.mark.skipif(bool(EMULATED), reason="nothing to see, or too long")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 33), (1, 1), (0, 8), (70, 40), (7, 513)]
if not EMULATED:
    SHAPES += [(3, 4096), (2000, 256)]
EPS = 1e-20
TOKENS = [0, 1, 40] if EMULATED else [0, 1, 40, 700]


def on_gpu(name, *arguments):
    """What the operator makes of these on a GPU, on the CPU again."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    found = getattr(torch.ops.torch_plugins, name)(*moved)
    parts = found if isinstance(found, (tuple, list)) else (found,)
    assert all(part.device.type == DEVICE for part in parts)
    return [part.cpu() for part in parts]


def agree(name, reference, *arguments, exact=()):
    """Shapes, dtypes, strides, and values: equal (``exact``), or within another order of sums."""
    found, expected = on_gpu(name, *arguments), reference(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        error = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-10}
        bound = 0 if i in exact else error.get(ours.dtype, 1e-4)
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, equal_nan=True)


def inputs(shape, dtype):
    torch.manual_seed(0)
    x, g = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
    h = torch.randn(shape[0], dtype=torch.promote_types(dtype, torch.float32))
    return x, g, h, torch.tensor(1.5), torch.tensor(-0.8)


# Rows, features, outputs, groups.
LINEARS = [
    (3, 75, 5, 3),
    (17, 45, 9, 5),
    (1, 1, 1, 1),
    (2, 7, 1, 7),
    (70, 300, 130, 2),
    (0, 64, 8, 1),
    (4, 64, 0, 1),
]
if not EMULATED:
    LINEARS += [(1, 4096, 4096, 32), (300, 4096, 130, 1)]


@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize("shape", LINEARS)
def test_w4a4_linear(shape, bits):
    rows, features, outputs, groups = shape
    for seed, dtype in enumerate(DTYPES):
        torch.manual_seed(seed)
        arguments = (
            (torch.randn(rows, features) * 3).to(dtype),
            int4.pack_int4(torch.randint(-8, 8, (outputs, features), dtype=torch.int8)),
            torch.rand(outputs, groups).to(dtype) + 0.1,
            torch.tensor([0.37]) if seed % 2 else None,
            torch.tensor([1.3]) if seed // 2 else None,
            torch.randn(outputs).to(dtype) if seed != 1 else None,
            bits,
        )
        agree("w4a4_linear", int4.w4a4_linear_reference, *arguments, exact=(0,))


def test_w4a4_linear_of_views():
    """A weight in the middle of memory, an input without its neighbours' features, NaN in a row."""
    codes = int4.pack_int4(torch.randint(-8, 8, (65, 128), dtype=torch.int8)).flatten()
    weight = torch.cat((codes.new_zeros(1), codes)).to(DEVICE)[1:].view(65, 64)
    x = torch.randn(20, 256)[:, ::2]
    x[3, 5] = torch.nan
    scale = torch.rand(65, 4)
    found = torch.ops.torch_plugins.w4a4_linear(
        x.to(DEVICE), weight, scale.to(DEVICE), None, None, None, 4
    )
    expected = int4.w4a4_linear_reference(x, weight.cpu(), scale, None, None, None, 4)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_quant_and_kurtosis(shape, dtype):
    x, g, h, high, low = inputs(shape, dtype)
    clips = high, low, 4
    agree("fake_quant", quantizer.fake_quant_reference, x, *clips, exact=(0,))
    agree("fake_quant_backward", quantizer.fake_quant_backward_reference, g, x, *clips, exact=(0,))
    agree("kurtosis", moments.kurtosis_reference, x, EPS)
    agree("kurtosis_backward", moments.kurtosis_backward_reference, h, x, EPS)
    reference = both.fake_quant_kurtosis_reference
    agree("fake_quant_kurtosis", reference, x, *clips, EPS, exact=(0,))
    reference = both.fake_quant_kurtosis_backward_reference
    agree("fake_quant_kurtosis_backward", reference, g, h, x, *clips, EPS)


@needs_library
@pytest.mark.parametrize("x", [torch.randn(6, 8).T, torch.randn(6, 16)[:, ::2]])
def test_memory_with_gaps_or_in_another_order(x):
    g, h = torch.randn(x.shape[1], x.shape[0]).T, torch.randn(2 * x.shape[0])[::2]
    clips = torch.tensor(1.0), torch.tensor(-1.0), 4
    reference = quantizer.fake_quant_backward_reference
    agree("fake_quant", quantizer.fake_quant_reference, x, *clips, exact=(0,))
    agree("fake_quant_backward", reference, g, x, *clips, exact=(0,))
    agree("kurtosis", moments.kurtosis_reference, x, EPS)
    agree("kurtosis_backward", moments.kurtosis_backward_reference, h, x, EPS)
    agree("fake_quant_kurtosis", both.fake_quant_kurtosis_reference, x, *clips, EPS)
    reference = both.fake_quant_kurtosis_backward_reference
    agree("fake_quant_kurtosis_backward", reference, g, h, x, *clips, EPS)
    weight = torch.rand(2 * x.shape[1])[::2]
    reference = norm.residual_add_rms_norm_reference
    agree("residual_add_rms_norm", reference, x, g, weight, 1e-6)
    total = reference(x, g, weight, 1e-6)[0]
    backward = norm.residual_add_rms_norm_backward_reference
    agree("residual_add_rms_norm_backward", backward, g, x, total, h, weight)


@needs_library
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_add_rms_norm(shape, dtype, weighted):
    residual, update, *_ = inputs(shape, dtype)
    weight = torch.rand(shape[1]) if weighted else None
    reference = norm.residual_add_rms_norm_reference
    agree("residual_add_rms_norm", reference, residual, update, weight, 1e-6, exact=(0,))
    total, _, rstd = reference(residual, update, weight, 1e-6)
    agree(
        "residual_add_rms_norm_backward",
        norm.residual_add_rms_norm_backward_reference,
        *(residual if weighted else None, update, total, rstd, weight),
    )


@needs_library
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_sparse_moe(tokens, dtype, activation):
    torch.manual_seed(0)
    experts, hidden, width = 6, 72, 50
    x, scores = torch.randn(hidden, tokens).T.to(dtype), torch.rand(experts, tokens).T
    kept = torch.rand(experts, tokens).T > 0.5
    gate, up = torch.randn(2, experts, width, hidden).to(dtype) / 8
    down = torch.randn(hidden, experts, width).to(dtype).transpose(0, 1) / 8
    arguments = x, scores, kept, gate if tokens != 40 else None, up, down, activation
    (found,) = on_gpu("sparse_moe", *arguments)
    expected = moe.sparse_moe_reference(*arguments)
    bound = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-4)
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def packed(experts, outputs, features):
    """Weights between those of others."""
    codes = torch.randint(-8, 8, (2 * experts, outputs, features), dtype=torch.int8)
    return int4.pack_int4(codes)[::2]


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", TOKENS)
def test_w4a4_sparse_moe(tokens, bits):
    """Exact with relu, which is the same function on every machine."""
    torch.manual_seed(0)
    experts, hidden, width = 6, 72, 50
    arguments = (
        torch.randn(hidden, tokens).T,
        torch.rand(experts, tokens).T,
        torch.rand(experts, tokens).T > 0.5,
        *(packed(experts, 2 * width, hidden), torch.rand(2 * experts, 2 * width, 3)[::2]),
        *(packed(experts, hidden, width), torch.rand(2 * experts, hidden, 1)[::2]),
    )
    arguments = *arguments, True, "relu", bits
    agree("w4a4_sparse_moe", moe.w4a4_sparse_moe_reference, *arguments, exact=(0,))


@needs_gpu
@needs_library
def test_gradients_are_those_of_the_cpu():
    x = torch.randn(9, 40)
    residual = torch.randn(9, 40)

    def loss(device):
        leaves = [t.to(device).requires_grad_() for t in (x, residual, torch.tensor([1.2]))]
        total, normed = norm.residual_add_rms_norm(leaves[1], leaves[0])
        quantized, k = both.fake_quant_kurtosis(normed, leaves[2], -leaves[2], 4)
        (quantized.square().sum() + k.sum() + total.sum()).backward()
        return [leaf.grad.cpu() for leaf in leaves]

    for ours, theirs in zip(loss("cuda"), loss("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@needs_library
def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 8).to(DEVICE), torch.zeros(3, 4, dtype=torch.uint8).to(DEVICE)
    linear, scale = torch.ops.torch_plugins.w4a4_linear, torch.ones(3, 1).to(DEVICE)
    for arguments, words in (
        ((x, weight[:, :3], scale, None, None, None, 4), "weight has the shape"),
        (
            (x, weight, torch.ones(3, 3).to(DEVICE), None, None, None, 4),
            "weight_scale has 3 columns",
        ),
        ((x, weight, scale, None, None, scale[:2, 0], 4), "bias has the shape"),
        ((x, weight, scale, None, None, None, 9), "input_bits is 9"),
    ):
        with pytest.raises(RuntimeError, match=words):
            linear(*arguments)


@needs_gpu
@needs_library
def test_the_stream_is_that_of_the_caller():
    """The input is ready on the caller's stream only after a long product."""
    stream, weight = torch.cuda.Stream(), torch.zeros(64, 2048, dtype=torch.uint8).to(DEVICE)
    scale = torch.ones(64, 1).to(DEVICE)
    with torch.cuda.stream(stream):
        big = torch.ones(4096, 4096).to(DEVICE)
        for _ in range(20):
            big = big @ big / 4096
        y = torch.ops.torch_plugins.w4a4_linear(big, weight, scale, None, None, None, 8)
    stream.synchronize()
    again = torch.ops.torch_plugins.w4a4_linear(big, weight, scale, None, None, None, 8)
    assert torch.equal(y, again)


@needs_gpu
@needs_library
def test_tensors_of_the_cpu_are_refused():
    x, weight = torch.ones(2, 8).to(DEVICE), torch.zeros(3, 4, dtype=torch.uint8).to(DEVICE)
    with pytest.raises(RuntimeError, match="weight_scale is not on the GPU"):
        torch.ops.torch_plugins.w4a4_linear(x, weight, torch.ones(3, 1), None, None, None, 4)
