"""Fused operators, native or not, against what they fuse, differentiated by torch."""

import pytest
import torch
from torch.nn import functional as F

from torch_plugins.ops.fake_quant import fake_quant
from torch_plugins.ops.fake_quant_kurtosis import fake_quant_kurtosis
from torch_plugins.ops.kurtosis import kurtosis
from torch_plugins.ops.residual_add_rms_norm import residual_add_rms_norm

OPS = torch.ops.torch_plugins
SHAPES = [(7,), (3, 5), (2, 3, 11), (0, 4)]


def values(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
def test_fake_quantization_with_kurtosis(shape):
    leaves = values(*shape), *(torch.tensor(c, dtype=torch.float64) for c in (1.3, -0.7))
    for clip in leaves[1:]:
        clip.requires_grad_()
    gradients = values(*shape, seed=1), values(*shape[:-1], seed=2)
    found = fake_quant_kurtosis(*leaves)
    expected = fake_quant(*leaves), kurtosis(leaves[0])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, gradients),
        torch.autograd.grad(expected, leaves, gradients),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_residual_add_and_norm(shape, weighted):
    leaves = [values(*shape), values(*shape, seed=1)]
    leaves += [values(shape[-1], seed=2)] if weighted else []
    gradients = values(*shape, seed=3), values(*shape, seed=4)
    found = residual_add_rms_norm(*leaves, eps=0.1)
    total = leaves[0] + leaves[1]
    expected = total, F.rms_norm(total, shape[-1:], *leaves[2:], eps=0.1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, gradients),
        torch.autograd.grad(expected, leaves, gradients),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_before_the_norm_and_the_norm_once(dtype):
    residual, update, weight = (values(2, 8, seed=i, dtype=dtype).detach() for i in range(3))
    total, normed = residual_add_rms_norm(residual, update, weight[0])
    assert total.dtype == normed.dtype == dtype
    assert torch.equal(total, residual + update)
    expected = F.rms_norm(total.double(), (8,), weight[0].double(), 1e-6).to(dtype)
    rtol = 0 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(normed, expected, rtol=rtol, atol=0)


def test_fused_operators_are_registered_as_torch_wants_them():
    x, weight = values(3, 8), values(8, seed=1)
    high, low = (torch.tensor([c], requires_grad=True) for c in (1.3, -0.7))
    torch.library.opcheck(OPS.fake_quant_kurtosis.default, (x, high, low, 4, 1e-6))
    torch.library.opcheck(OPS.residual_add_rms_norm.default, (x, x, weight, 1e-6))


def test_fused_operators_compile_whole():
    def loss(x, weight, high, low):
        total, normed = residual_add_rms_norm(x, 2 * x, weight)
        xhat, k = fake_quant_kurtosis(normed, high, low)
        return (total * xhat).sum() + k.mean()

    leaves = values(3, 8), values(8, seed=1), *(values(1, seed=i).exp().detach() for i in (2, 3))
    leaves = [*leaves[:3], -leaves[3]]
    for clip in leaves[2:]:
        clip.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )
