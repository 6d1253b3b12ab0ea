"""FP4 weights and inputs against our grid and compressed-tensors' own functions."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)

from torch_plugins.config import ConfigError
from torch_plugins.ops.dynamic_quant import fake_quant_fp4
from torch_plugins.w4a4.activations import BlockInput
from torch_plugins.w4a4.compressed import FORMATS, section, weight_from, weight_tensors
from torch_plugins.w4a4.fp4 import pack_fp4, quantize_fp4, unpack_fp4

GRIDS = {"mxfp4": 32, "nvfp4": 16}


def weights(grid: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """``[O, I]`` each, of odd and even O, with 1 to 5 blocks a row."""
    size, draw = GRIDS[grid], torch.Generator().manual_seed(0)

    def normal(rows: int, blocks: int) -> torch.Tensor:
        return torch.randn(rows, blocks * size, generator=draw)

    rows = 2.0 ** torch.arange(-12, 13)[:, None]
    last = normal(3, 3)
    last[:, -1] = 100.0
    border = normal(25, 3).clamp(-1, 1)
    border[:, 5] = 1.75
    zeros = normal(3, 4)
    zeros[1], zeros[2, size : 2 * size] = 0, 0
    under = normal(2, 2) * 1e4  # and a block whose scale is 0 in e4m3
    under[0, :size] = torch.linspace(-1, 1, size)
    found = {
        "one block": normal(1, 1),
        "odd": normal(7, 5),
        "rows of all sizes": normal(25, 4) * rows,
        "largest in the last block": last,
        "ties": torch.arange(-4 * size, 4 * size).reshape(2, -1) / 8,
        "1.75 times powers of two": border * rows,
        "zeros": zeros,
        "only zeros": torch.zeros(2, size),
        "under e4m3": under,
        "huge": normal(3, 2) * 5e37,
        "small": normal(3, 2) * 1e-30,
        "nearly denormal": normal(3, 2) * 1e-37,
        "denormal": normal(3, 2) * 1e-39,
    }
    return {name: weight.to(dtype) for name, weight in found.items()}


NAMES = list(weights("mxfp4"))


def scheme(grid: str) -> QuantizationScheme:
    """As a folder says it."""
    group = section(-1, None, [], grid)["config_groups"]["group_0"]
    return QuantizationScheme(**group)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_unpack_to_our_grid_bit_for_bit(grid, name):
    """compressed-tensors reads what training's grid has, and packs the same bytes of it."""
    weight = weights(grid)[name]
    stored = weight_tensors(quantize_fp4(weight, grid), torch.bfloat16)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[grid])
    unpacked = compressor.decompress(stored, scheme(grid))
    expected = fake_quant_fp4(weight, grid)
    assert unpacked["weight"].dtype == torch.bfloat16
    assert torch.equal(bits(unpacked["weight"]), bits(expected))
    assert torch.equal(weight_from(stored), expected.float())
    plain = {"weight": weight.float(), "weight_scale": unpacked["weight_scale"].float()}
    plain |= {key: stored[key] for key in stored if "global" in key}
    again = compressor.compress(plain, scheme(grid))
    assert again.keys() == stored.keys()
    for part, tensor in stored.items():
        assert again[part].dtype == tensor.dtype
        assert torch.equal(again[part].view(torch.uint8), tensor.view(torch.uint8)), part


@pytest.mark.parametrize("name", [n for n in NAMES if "denormal" not in n])
def test_scales_of_nvfp4_are_those_of_compressed_tensors(name):
    """But of weights under 1e-36, whose scale of the whole it takes for infinite."""
    weight = weights("nvfp4")[name].float()
    scales = quantize_fp4(weight, "nvfp4").scales_OG
    blocks = weight.unflatten(1, (-1, 16))
    args = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    if weight.any():
        whole = generate_gparam(weight.amin(), weight.amax())
        assert scales.whole == whole
        expected, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
        assert torch.equal(scales.of_block.float(), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_values_of_a_row_by_hand(grid):
    """The largest is 6 of the scale; 2.5 and 5 are ties, which go to the even 2 and 4."""
    row = torch.zeros(1, GRIDS[grid])
    row[0, :6] = torch.tensor([6.0, -5.0, 2.5, 0.3, -0.2, 1.6])
    stored = weight_tensors(quantize_fp4(row, grid), torch.bfloat16)
    assert stored["weight_packed"][0, :3].tolist() == [0xE7, 0x14, 0x38]
    if grid == "mxfp4":
        assert stored["weight_scale"].tolist() == [[127]]
    else:
        assert stored["weight_global_scale"].tolist() == [448]
        assert stored["weight_scale"].float().tolist() == [[448]]
    assert weight_from(stored)[0, :6].tolist() == [6, -4, 2, 0.5, -0.0, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
def test_other_dtypes_are_rounded_in_fp32(grid, dtype):
    weight = weights(grid, dtype)["rows of all sizes"].mT.contiguous().mT
    found = quantize_fp4(weight, grid).dequantize()
    assert torch.equal(found, fake_quant_fp4(weight.float(), grid))


def test_codes_pack_and_unpack():
    codes = torch.arange(256).reshape(4, 64).remainder(16).to(torch.uint8)
    assert torch.equal(unpack_fp4(pack_fp4(codes)), codes)
    assert torch.equal(unpack_fp4(pack_fp4(codes[:0])), codes[:0])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(grid, value):
    weight = weights(grid)["odd"]
    weight[2, 3] = value
    with pytest.raises(ConfigError, match=r"x\.y: has weights that are NaN or infinite"):
        quantize_fp4(weight, grid, name="x.y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_of_compressed_tensors(name, dtype):
    """Also where it takes a larger scale than the grid of training."""
    x = weights("mxfp4", dtype)[name].unsqueeze(0)
    group = section(-1, BlockInput(), [], "mxfp4")["config_groups"]["group_0"]
    args = QuantizationArgs(**group["input_activations"])
    preset = preset_name_to_scheme("MXFP4", ["Linear"]).input_activations
    assert args.model_dump() == preset.model_dump()
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    expected = fake_quantize(x, scale, zero, args)
    found = BlockInput()(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    if name == "rows of all sizes":
        assert not torch.equal(found, fake_quant_fp4(x, "mxfp4"))


@pytest.mark.parametrize("grid", GRIDS)
def test_no_rows_are_no_rows(grid):
    empty = torch.empty(0, 2 * GRIDS[grid])
    assert fake_quant_fp4(empty, grid).shape == empty.shape
    assert quantize_fp4(empty, grid).dequantize().shape == empty.shape
    assert BlockInput()(torch.empty(2, 0, 64)).shape == (2, 0, 64)
