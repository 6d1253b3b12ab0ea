"""Quantized folders in formats of compressed-tensors: ``pack-quantized``, and two of FP4.

For each quantized linear layer, in place of its ``weight``:

====================  =============  ===========================================================
tensor                dtype, shape   meaning
====================  =============  ===========================================================
weight_packed         int32          codes; see :mod:`torch_plugins.ops.int4`
weight_scale          ``[O, G]``     fp32, or as ``--dtype`` says
weight_shape          int64 ``[2]``  O, I
input_scale           fp32 ``[1]``   with static activations
input_zero_point      fp32 ``[1]``   with asymmetric ones: compressed-tensors computes with the
                                     dtype that ``zp_dtype`` names, so that it need not be rounded
====================  =============  ===========================================================

In ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``, of which the weights unpack to bfloat16:

====================  ==============  ==========================================================
weight_packed         uint8           two codes each, ``[O, I / 2]``; see ``fp4.py``
weight_scale          ``[O, G]``      mxfp4: uint8, exponent + 127; nvfp4: e4m3
weight_global_scale   fp32 ``[1]``    nvfp4: g, by which its scales are divided
====================  ==============  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..feature import ConfigError
from ..ops.dynamic_quant import FP4Scales
from ..ops.int4 import pack_int4, unpack_int4
from ..w4a4_config import BLOCKS
from ..weight_quant import Quantized
from .activations import BlockInput, Input, StaticInput, TokenInput
from .folder import CLIPS, Folder, cast
from .fp4 import QuantizedFP4, pack_fp4, unpack_fp4
from .quantize import BITS

FORMATS = {
    "int4": "pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
GLOBAL = "weight_global_scale"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"


def weight_tensors(
    quantized: Quantized | QuantizedFP4, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """A weight as it is stored, by the last part of the name.

    Args:
        scale_dtype: of int4.
    """
    if isinstance(quantized, QuantizedFP4):
        scales = quantized.scales_OG
        whole = {} if scales.whole is None else {GLOBAL: scales.whole.float().reshape(1)}
        return {PACKED: pack_fp4(quantized.codes_OI), SCALE: scales.of_block} | whole
    codes = quantized.codes_OI
    halves = pack_int4(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8), value=-8))
    return {
        PACKED: halves.contiguous().view(torch.int32),
        SCALE: quantized.scales_OG.to(scale_dtype),
        SHAPE: torch.tensor(codes.shape),
    }


def weight_from(tensors: Mapping[str, Tensor]) -> Tensor:
    """``[O, I]`` in fp32, as readers of a folder have it: unpacked FP4 is bfloat16."""
    if SHAPE not in tensors:
        whole = tensors[GLOBAL][0] if GLOBAL in tensors else None
        scales = FP4Scales(tensors[SCALE], whole)
        return QuantizedFP4(unpack_fp4(tensors[PACKED]), scales).dequantize().bfloat16().float()
    codes = unpack_int4(tensors[PACKED].view(torch.uint8), int(tensors[SHAPE][1]))
    return Quantized(codes, tensors[SCALE].float()).dequantize()


def input_tensors(how: Input | None) -> dict[str, Tensor]:
    """What is stored of an input's quantization, by the last part of the name."""
    if not isinstance(how, StaticInput):
        return {}
    zero = {} if how.zero_point is None else {INPUT_ZERO: how.zero_point}
    return {INPUT_SCALE: how.scale} | zero


def input_from(inputs: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Input | None:
    """The quantization of an input, of the arguments that :func:`section` wrote.

    Raises:
        ConfigError: they are others.
    """
    if inputs is None:
        return None
    if inputs["type"] == "float":
        if inputs != _block_args("mxfp4") | {"dynamic": True}:
            raise ConfigError(f"inputs of linear layers are quantized in another way: {inputs}")
        return BlockInput()
    if inputs["dynamic"]:
        return TokenInput(inputs["num_bits"])
    return StaticInput(tensors[INPUT_SCALE], tensors.get(INPUT_ZERO), inputs["num_bits"])


def section(
    group_size: int, how: Input | None, ignore: list[str], weight_format: str = "int4"
) -> dict[str, Any]:
    """``quantization_config`` of a folder.

    Args:
        how: of any quantized layer; all are alike.
        ignore: linear layers that are not quantized.
        weight_format: of :data:`FORMATS`.
    """
    weights = _args(BITS, symmetric=True) | {
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    if weight_format != "int4":
        weights = _block_args(weight_format)
    inputs = None
    if isinstance(how, BlockInput):
        inputs = _block_args("mxfp4") | {"dynamic": True}
    elif isinstance(how, StaticInput):
        inputs = _args(how.bits, how.zero_point is None) | {"strategy": "tensor"}
        if how.zero_point is not None:
            inputs["zp_dtype"] = str(torch.float32)
    elif how is not None:
        inputs = _args(how.bits, symmetric=True) | {"strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": FORMATS[weight_format],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[weight_format],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _args(bits: int, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}


def _block_args(grid: str) -> dict[str, Any]:
    return {
        "num_bits": BITS,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if grid == "mxfp4" else "tensor_group",
        "group_size": BLOCKS[grid],
        "scale_dtype": str(torch.uint8 if grid == "mxfp4" else torch.float8_e4m3fn),
    }


class QuantizedWeights:
    """All tensors of a quantized folder by name, made one at a time; for ``write_weights``.

    Args:
        source: what was quantized.
        dtype: of floating-point tensors; None: as they are.
        stored: of each quantized linear layer, the tensors by the last part of the name.
        known: names that the model has; others of the source are left out.
    """

    def __init__(
        self,
        source: Folder,
        dtype: torch.dtype | None,
        stored: Mapping[str, Mapping[str, Tensor]],
        known: set[str],
    ) -> None:
        self.source, self.dtype, self.stored = source, dtype, stored
        self.names: dict[str, tuple[str, str]] = {}
        for name in source.files:
            linear, _, last = name.rpartition(".")
            if last == "weight" and linear in stored:
                self.names |= {f"{linear}.{part}": (linear, part) for part in stored[linear]}
            elif name in known and not name.endswith(CLIPS):
                self.names[name] = ("", name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Tensor:
        linear, part = self.names[name]
        return self.stored[linear][part] if linear else cast(self.source.get(part), self.dtype)

    def meta(self, name: str) -> Tensor:
        return self[name].to("meta")
