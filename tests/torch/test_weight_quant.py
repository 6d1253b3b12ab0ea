"""Round to nearest and GPTQ, against the algorithm with every inverse taken anew."""

import pytest
import torch

from torch_plugins.config import ConfigError
from torch_plugins.weight_quant import gptq, round_to_nearest

ROWS, COLUMNS, TOKENS = 6, 24, 200


def calibration(columns=COLUMNS, tokens=TOKENS):
    """A weight, and inputs whose features go together and differ in size."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    common = draw(tokens, 4) @ draw(4, columns)
    inputs = (draw(tokens, columns) + common) * (1 + draw(columns).square())
    return draw(ROWS, columns), inputs


def quantized(w, scale):
    return (w / scale).round().clamp(-8, 7)


def naive(weight, inputs, size, damping, order):
    """For each column in turn: the optimal change of all later ones, from the inverse of what is
    left of H (arXiv 2210.17323, equations 2 and 3)."""
    columns = weight.shape[1]
    w, h = weight.clone(), inputs.T @ inputs
    h = h + damping * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    codes = torch.zeros_like(w)
    scales = {}
    for turn, column in enumerate(order):
        group, static = column // size, list(order) != sorted(order)
        if group not in scales:
            source = weight if static else w
            scales[group] = source[:, group * size : (group + 1) * size].abs().amax(1) / 7.5
        left = order[turn:]
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, column] = quantized(w[:, column], scales[group])
        error = (w[:, column] - codes[:, column] * scales[group]) / inverse[0, 0]
        w[:, left] -= torch.outer(error, inverse[0])
    return codes, torch.stack([scales[group] for group in sorted(scales)], 1)


@pytest.mark.parametrize("size", [-1, 8, 24])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "by activation"])
def test_gptq_is_the_update_with_every_inverse(size, act_order):
    weight, inputs = calibration()
    hessian = inputs.T @ inputs
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(COLUMNS)
    found = gptq(weight, hessian, group_size=size, act_order=act_order)
    width = COLUMNS if size == -1 else size
    codes, scales = naive(weight, inputs, width, 0.01, order.tolist())
    assert torch.equal(found.codes_OI.double(), codes)
    torch.testing.assert_close(found.scales_OG, scales)


@pytest.mark.parametrize("size", [-1, 50])
def test_blocks_change_nothing(size):
    """300 columns are three blocks, or six groups."""
    weight, inputs = calibration(300, 900)
    found = gptq(weight, inputs.T @ inputs, group_size=size, damping=0.1)
    codes, _ = naive(weight, inputs, 300 if size == -1 else size, 0.1, list(range(300)))
    assert torch.equal(found.codes_OI.double(), codes)


def test_by_hand():
    """Two columns with the same input: the second takes up the first one's whole error."""
    weight = torch.tensor([[7.5, 0.4, -0.4]], dtype=torch.float64)
    hessian = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.float64)
    found = gptq(weight, hessian, damping=1e-9)
    assert found.scales_OG.item() == 1
    assert found.codes_OI.tolist() == [[7, 0, 0]]  # 0.4 is left over, and -0.4 + 0.4 = 0
    assert round_to_nearest(weight).codes_OI.tolist() == [[7, 0, 0]]
    weight = torch.tensor([[7.5, 0.4, 0.4]], dtype=torch.float64)
    assert gptq(weight, hessian, damping=1e-9).codes_OI.tolist() == [[7, 0, 1]]
    assert round_to_nearest(weight).codes_OI.tolist() == [[7, 0, 0]]


def test_outputs_change_less_than_by_rounding():
    weight, inputs = calibration()

    def error(found):
        return ((weight - found.dequantize()) @ inputs.T).square().sum().item()

    hessian = inputs.T @ inputs
    for size in (-1, 8):
        rounded = error(round_to_nearest(weight, group_size=size))
        for act_order in (False, True):
            found = gptq(weight, hessian, group_size=size, act_order=act_order)
            assert error(found) < 0.6 * rounded


def test_codes_scales_and_dtypes():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[0] = 0
    found = round_to_nearest(weight, bits=4, group_size=8)
    assert (found.codes_OI.dtype, found.scales_OG.dtype) == (torch.int8, torch.float32)
    assert found.scales_OG.shape == (ROWS, 3)
    assert -8 <= found.codes_OI.min() <= found.codes_OI.max() <= 7
    assert torch.equal(found.dequantize()[0], torch.zeros(COLUMNS))
    error = (found.dequantize() - weight.float()).abs()
    assert (error <= found.scales_OG.repeat_interleave(8, 1) / 2 * 1.001).all()


def test_inputs_that_are_always_zero_do_no_harm():
    weight, inputs = calibration()
    inputs[:, 5] = 0
    for damping in (0.0, 0.01):
        found = gptq(weight, inputs.T @ inputs, damping=damping)
        assert found.dequantize().isfinite().all()
        assert found.codes_OI[:, 5].eq(0).all()


@pytest.mark.parametrize("size", [7, 0, -2, 48])
def test_groups_that_do_not_fit(size):
    weight, inputs = calibration()
    for quantize in (round_to_nearest, lambda w, **kw: gptq(w, inputs.T @ inputs, **kw)):
        with pytest.raises(ConfigError, match=f"group_size {size}: must divide the 24 columns"):
            quantize(weight, group_size=size)


@pytest.mark.parametrize("size", [-1, 8])
def test_codes_are_those_of_the_scales_that_are_stored(size):
    weight, inputs = calibration()
    coarse = round_to_nearest(weight, group_size=size, scale_dtype=torch.bfloat16)
    assert torch.equal(coarse.scales_OG, coarse.scales_OG.bfloat16().double())
    assert not torch.equal(coarse.scales_OG, round_to_nearest(weight, group_size=size).scales_OG)
    spread = coarse.scales_OG.repeat_interleave(COLUMNS // coarse.scales_OG.shape[1], 1)
    assert torch.equal(coarse.codes_OI.double(), quantized(weight, spread))
    found = gptq(weight, inputs.T @ inputs, group_size=size, scale_dtype=torch.bfloat16)
    assert torch.equal(found.scales_OG, found.scales_OG.bfloat16().double())
