"""Quantized folders in the format ``pack-quantized`` of compressed-tensors.

For each quantized linear layer, in place of its ``weight``:

====================  =============  ===========================================================
tensor                dtype, shape   meaning
====================  =============  ===========================================================
weight_packed         int32          codes; see :mod:`torch_plugins.ops.int4`
weight_scale          ``[O, G]``     in the dtype of the model
weight_shape          int64 ``[2]``  O, I
input_scale           fp32 ``[1]``   with static activations
input_zero_point      fp32 ``[1]``   with asymmetric ones: compressed-tensors computes with the
                                     dtype that ``zp_dtype`` names, so that it need not be rounded
====================  =============  ===========================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.int4 import pack_int4, unpack_int4
from ..weight_quant import Quantized
from .activations import Input, StaticInput
from .folder import CLIPS, Folder, cast
from .quantize import BITS

FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"


def weight_tensors(quantized: Quantized, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight as it is stored, by the last part of the name."""
    codes = quantized.codes_OI
    halves = pack_int4(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8), value=-8))
    return {
        PACKED: halves.contiguous().view(torch.int32),
        SCALE: quantized.scales_OG.to(scale_dtype),
        SHAPE: torch.tensor(codes.shape),
    }


def weight_from(tensors: Mapping[str, Tensor]) -> Quantized:
    """The inverse of :func:`weight_tensors`; scales in fp32."""
    codes = unpack_int4(tensors[PACKED].view(torch.uint8), int(tensors[SHAPE][1]))
    return Quantized(codes, tensors[SCALE].float())


def input_tensors(how: Input | None) -> dict[str, Tensor]:
    """What is stored of an input's quantization, by the last part of the name."""
    if not isinstance(how, StaticInput):
        return {}
    zero = {} if how.zero_point is None else {INPUT_ZERO: how.zero_point}
    return {INPUT_SCALE: how.scale} | zero


def section(group_size: int, how: Input | None, ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a folder.

    Args:
        how: of any quantized layer; all are alike.
        ignore: linear layers that are not quantized.
    """
    weights = _args(BITS, symmetric=True) | {
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    inputs = None
    if isinstance(how, StaticInput):
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
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _args(bits: int, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}


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
