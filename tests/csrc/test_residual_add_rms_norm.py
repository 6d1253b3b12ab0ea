"""Addition to the residual stream and its RMS norm in native code, against the reference."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.csrc.activations import DTYPES, LAYOUTS, SHAPES, close, draw, laid_out, same
from tests.csrc.activations import wide as wide_of
from tests.csrc.conftest import EXAMPLES
from torch_plugins.ops.residual_add_rms_norm import (
    residual_add_rms_norm,
    residual_add_rms_norm_backward_reference,
    residual_add_rms_norm_reference,
)

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.torch_plugins
EPS = 1e-6


def in_fp64(reference, dtypes, *arguments):
    """The reference in fp64, its results in these dtypes."""
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    return [out.to(dtype) for out, dtype in zip(reference(*wide), dtypes, strict=True)]


def largest(x):
    return x.double().abs().max().item() if x.numel() else 0.0


def compare(residual, update, weight, g_sum, g):
    dtype, wide = residual.dtype, wide_of(residual.dtype)
    eps = 2 * torch.finfo(dtype).eps + 20 * torch.finfo(wide).eps
    total, normed, rstd = OPS.residual_add_rms_norm(residual, update, weight, EPS)
    same(total, residual + update)
    zero = torch.zeros_like(total)
    expected = in_fp64(
        residual_add_rms_norm_reference, (dtype, dtype, wide), total, zero, weight, EPS
    )
    close(normed, expected[1])
    close(rstd, expected[2])
    assert total.is_contiguous()
    assert normed.is_contiguous()

    dx, d_weight = OPS.residual_add_rms_norm_backward(g_sum, g, total, rstd, weight)
    dtypes = (dtype, dtype if weight is None else weight.dtype)
    arguments = (g_sum, g, total, expected[2], weight)
    backward = in_fp64(residual_add_rms_norm_backward_reference, dtypes, *arguments)
    weighted = g.double() if weight is None else g.double() * weight.double()
    parts = weighted * expected[2].double().unsqueeze(-1)  # they may cancel
    close(dx, backward[0], atol=eps * max(largest(parts), 0 if g_sum is None else largest(g_sum)))
    assert d_weight.shape == backward[1].shape
    terms = (g.double() * (total.double() * expected[2].double().unsqueeze(-1))).abs().sum().item()
    close(d_weight, backward[1], rtol=2 * torch.finfo(dtypes[1]).eps, atol=terms * 1e-6 + 1e-30)
    assert dx.is_contiguous()


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from((None, *DTYPES)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    with_sum=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_the_reference_computes(shape, dtype, weight_dtype, layouts, with_sum, seed):
    tensors = [laid_out(draw(shape, dtype, seed + i), how) for i, how in enumerate(layouts)]
    residual, update, g, g_sum = tensors
    weight = None if weight_dtype is None else draw(shape[-1:], weight_dtype, seed + 9)
    compare(residual, update, weight, g_sum if with_sum else None, g)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_of_memory(layout, dtype):
    for index in range(4):
        residual, update, g, g_sum = (
            laid_out(draw((3, 5, 33), dtype, i), layout if i == index else "contiguous")
            for i in range(4)
        )
        compare(residual, update, draw((66,), dtype, 9)[::2], g_sum, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4095), (2, 12_345), (1000, 33), (9000, 5)])
def test_blocks_of_features_and_groups_of_rows(dtype, shape):
    residual, update, g, g_sum = (draw(shape, dtype, i) for i in range(4))
    for weight_dtype in {dtype, torch.float32}:
        compare(residual, update, draw(shape[-1:], weight_dtype, 9), g_sum, g)


def test_half_precision_is_rounded_where_torch_rounds():
    """Bit for bit: 8 features, whose fp32 sum has one value in nearly any order."""
    residual, update = (draw((2000, 8), torch.bfloat16, i) for i in range(2))
    weight = draw((8,), torch.bfloat16, 2)
    total, normed = residual_add_rms_norm(residual, update, weight, EPS)
    stock = F.rms_norm(residual.clone().add_(update), (8,), weight, EPS)
    assert torch.equal(total, residual + update)
    assert (normed != stock).sum() <= 8


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(value, dtype):
    residual, update, g = (draw((3, 40), dtype, i) for i in range(3))
    residual[1, 7] = update[1, 7] = value
    weight = draw((40,), dtype, 9)
    total, normed, rstd = OPS.residual_add_rms_norm(residual, update, weight, EPS)
    expected = residual_add_rms_norm_reference(residual, update, weight, EPS)
    for mine, theirs in zip((total, normed, rstd), expected, strict=True):
        close(mine, theirs)
        assert mine[[0, 2]].isfinite().all()
    found = OPS.residual_add_rms_norm_backward(None, g, total, rstd, weight)
    backward = residual_add_rms_norm_backward_reference(None, g, total, rstd, weight)
    for mine, theirs in zip(found, backward, strict=True):
        close(mine, theirs, rtol=2e-2)


def test_no_kind_of_nan_turns_into_a_number():
    odd = torch.frombuffer(bytearray(struct.pack("<I", 0x7FFFFFFF)), dtype=torch.float32)
    x = draw((2, 40), torch.bfloat16)
    _, normed, _ = OPS.residual_add_rms_norm(x, x, odd.expand(40), EPS)
    assert normed.isnan().all()
    assert OPS.residual_add_rms_norm_backward(None, x, x, odd.expand(2), None)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype, threads):
    residual, update, g, g_sum = (draw((777, 200), dtype, i) for i in range(4))
    weight = draw((200,), torch.float32, 9)
    found = []
    for count in (1, 2, 3):
        threads(count)
        total, normed, rstd = OPS.residual_add_rms_norm(residual, update, weight, EPS)
        backward = OPS.residual_add_rms_norm_backward(g_sum, g, total, rstd, weight)
        found.append((total, normed, rstd, *backward))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("with_weight", [True, False])
def test_gradients_in_double_precision(with_weight):
    residual, update = (draw((3, 2, 7), torch.float64, i).requires_grad_() for i in range(2))
    weight = draw((7,), torch.float64, 2).requires_grad_() if with_weight else None
    assert torch.autograd.gradcheck(residual_add_rms_norm, (residual, update, weight, 0.1))


def test_gradients_of_one_output_alone():
    leaves = [draw((3, 7), torch.float32, i).requires_grad_() for i in range(2)]
    leaves.append(draw((7,), torch.float32, 2).requires_grad_())
    total, normed = residual_add_rms_norm(*leaves)
    g = draw((3, 7), torch.float32, 3)
    of_sum = torch.autograd.grad(total, leaves, g, retain_graph=True, allow_unused=True)
    assert torch.equal(of_sum[0], g)
    assert torch.equal(of_sum[1], g)
    assert of_sum[2] is None
    of_normed = torch.autograd.grad(normed, leaves, g, retain_graph=True)
    both = torch.autograd.grad((total, normed), leaves, (g, g))
    close(both[0], of_normed[0] + g)
    assert torch.equal(both[2], of_normed[2])


def test_wrong_input_is_named():
    x, w = draw((3, 8), torch.float32), draw((8,), torch.float32)
    with pytest.raises(RuntimeError, match=r"update has the shape \[8\]: must be \[3, 8\]"):
        OPS.residual_add_rms_norm(x, w, w, EPS)
    with pytest.raises(RuntimeError, match="update is bfloat16: must be float32"):
        OPS.residual_add_rms_norm(x, x.bfloat16(), w, EPS)
    with pytest.raises(RuntimeError, match="residual is int64"):
        OPS.residual_add_rms_norm(x.long(), x.long(), None, EPS)
    with pytest.raises(RuntimeError, match=r"weight has the shape \[7\].*must be 8"):
        OPS.residual_add_rms_norm(x, x, w[:7], EPS)
    with pytest.raises(RuntimeError, match="weight is int64"):
        OPS.residual_add_rms_norm(x, x, w.long(), EPS)
    with pytest.raises(RuntimeError, match=r"rstd has the shape \[1\]: must be \[3\]"):
        OPS.residual_add_rms_norm_backward(None, x, x, torch.ones(1), w)
    with pytest.raises(RuntimeError, match=r"g_sum has the shape \[2, 8\]: must be \[3, 8\]"):
        OPS.residual_add_rms_norm_backward(x[:2], x, x, torch.ones(3), w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conventions_of_torch(dtype):
    residual, update = (draw((3, 8), dtype, i).requires_grad_() for i in range(2))
    weight = draw((8,), dtype, 2).requires_grad_()
    for w in (weight, None):
        torch.library.opcheck(OPS.residual_add_rms_norm.default, (residual, update, w, EPS))
    x = residual.detach()
    turned = draw((8, 3), dtype).T
    torch.library.opcheck(OPS.residual_add_rms_norm.default, (turned, x, None, EPS))
    for g_sum, w in ((x, weight.detach()), (None, None)):
        arguments = (g_sum, x, x, torch.ones(3, dtype=wide_of(dtype)), w)
        torch.library.opcheck(OPS.residual_add_rms_norm_backward.default, arguments)


def test_compiled_graphs_give_the_same():
    def step(residual, update, weight):
        total, normed = residual_add_rms_norm(residual, update * 2, weight)
        return total + normed.sin()

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (step, compiled):
        leaves = [draw((5, 33), torch.float32, i).requires_grad_() for i in range(2)]
        leaves.append(draw((33,), torch.float32, 2).requires_grad_())
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), results[0][0])


def test_a_gradient_is_found_only_where_one_is_wanted():
    x, w = draw((3, 8), torch.float32), draw((8,), torch.float32)
    assert residual_add_rms_norm(x, x, w)[1].grad_fn is None
    assert residual_add_rms_norm(x, x, w.requires_grad_())[1].grad_fn is not None
    with torch.no_grad():
        assert residual_add_rms_norm(x, x, w)[1].grad_fn is None
