"""Quantized folders in four bits of memory: what ``quantize`` wrote, for inference.

compressed-tensors unpacks all weights before the first forward pass. Here they stay packed, and a
linear layer is one operator, :func:`torch_plugins.ops.int4.w4a4_linear`; on a CPU with native
operators (``csrc/``), its prepacked form.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feature import ConfigError
from ..native import active
from ..ops.int4 import unpack_int4, w4a4_linear
from ..ops.prepacked import prepack_w4, unprepack_w4, w4a4_linear_prepacked
from ..weight_quant import Quantized
from .compressed import BITS, FORMATS, INPUT_SCALE, INPUT_ZERO, PACKED, SCALE, SHAPE
from .folder import Folder
from .marker import SECTION


class W4A4Linear(nn.Module):
    """``y = Q(W) Q(x) + b`` with four-bit weights in memory; has no gradient.

    Buffers: ``weight_packed`` uint8 ``[O, ceil(I / 2)]``, ``weight_scale`` ``[O, G]``, ``bias``
    ``[O]`` or None, ``input_scale`` and ``input_zero_point`` fp32 ``[1]``, or None. After
    :meth:`prepack`, ``prepacked`` stands for the first two, which then are None, for as long as the
    layer stays on the CPU.

    Args:
        inputs: ``static`` (scale and perhaps zero point), ``token``, or ``none``: weights only.
        bits: of the inputs.
    """

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    prepacked: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight_packed: Tensor,
        weight_scale: Tensor,
        in_features: int,
        inputs: str,
        bits: int = BITS,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, weight_packed.shape[0]
        self.inputs, self.bits = inputs, bits
        self.register_buffer("weight_packed", weight_packed)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("prepacked", None, persistent=False)
        self.groups = weight_scale.shape[1]
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.inputs == "none":
            return F.linear(input, self.weight.to(input.dtype), self.bias)
        rest = (self.input_scale, self.input_zero_point, self.bias, self.bits)
        if self.prepacked is not None:
            return w4a4_linear_prepacked(input, self.prepacked, self.out_features, *rest)
        assert self.weight_packed is not None
        assert self.weight_scale is not None
        return w4a4_linear(input, self.weight_packed, self.weight_scale, *rest)

    def prepack(self) -> None:
        """Bring the weight into the order in which CPUs read it. Its scales become fp32."""
        if self.prepacked is None:
            assert self.weight_packed is not None
            assert self.weight_scale is not None
            self.prepacked = prepack_w4(self.weight_packed, self.weight_scale, self.in_features)
            self.weight_packed = self.weight_scale = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.prepacked is not None and self.prepacked.device.type != "cpu":
            self.weight_packed, self.weight_scale = self._plain()
            self.prepacked = None
        return self

    def _plain(self) -> tuple[Tensor, Tensor]:
        if self.prepacked is not None:
            return unprepack_w4(self.prepacked)[:2]
        assert self.weight_packed is not None
        assert self.weight_scale is not None
        return self.weight_packed, self.weight_scale

    @property
    def weight(self) -> Tensor:
        """``code * scale`` ``[O, I]``, made anew."""
        packed, scale = self._plain()
        return Quantized(unpack_int4(packed, self.in_features), scale).dequantize()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, groups={self.groups}, inputs={self.inputs}, bits={self.bits}"


def load_quantized(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a folder that ``quantize`` wrote, in eval mode.

    Args:
        dtype: of everything that is not quantized; None: the folder's.

    Raises:
        ConfigError: the folder is not such a one, or lacks a tensor.
    """
    source = Folder(Path(folder), trust_remote_code, quantized=True)
    inputs, ignore = scheme(source)
    if (weights := source.fields[SECTION]["format"]) != FORMATS["int4"]:
        raise ConfigError(
            f"{source.path}: weights are {weights}, and no operator here computes with packed FP4; "
            "load it with transformers"
        )
    dtype = dtype or getattr(source.config, "dtype", None) or torch.float32
    model = source.build(dtype)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name not in ignore:
            model.set_submodule(name, _linear(source, name, linear, inputs, dtype))
    source.check(model)
    packed = {name for name, module in model.named_modules() if isinstance(module, W4A4Linear)}
    names = source.files.keys() & model.state_dict().keys()
    source.pour(model, sorted(n for n in names if n.rpartition(".")[0] not in packed), dtype)
    if torch.device(device).type == "cpu" and active("cpu"):
        for module in model.modules():
            if isinstance(module, W4A4Linear) and module.inputs != "none":
                module.prepack()
    model.to(device)
    model.save_pretrained = _refuse
    return model


def scheme(source: Folder) -> tuple[dict[str, Any] | None, set[str]]:
    """Arguments of inputs, and the linear layers that are not quantized.

    Raises:
        ConfigError: not what ``quantize`` writes.
    """
    section = source.fields.get(SECTION) or {}
    groups = list(section.get("config_groups", {}).values())
    if (
        section.get("format") not in FORMATS.values()
        or len(groups) != 1
        or groups[0]["targets"] != ["Linear"]
    ):
        raise ConfigError(
            f"{source.path}: {SECTION} is not that of python -m torch_plugins.w4a4 quantize; load "
            "it with transformers"
        )
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    if weights["num_bits"] != BITS or not weights["symmetric"]:
        raise ConfigError(f"{source.path}: weights are not symmetric with 4 bits, but {weights}")
    return inputs, set(section.get("ignore", ()))


def _linear(
    source: Folder,
    name: str,
    plain: nn.Linear,
    inputs: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> W4A4Linear:
    def get(part: str) -> Tensor | None:
        return source.get(f"{name}.{part}") if f"{name}.{part}" in source.files else None

    words, scale, shape = get(PACKED), get(SCALE), get(SHAPE)
    if words is None or scale is None or shape is None:
        raise ConfigError(f"{source.path}: no {name}.{PACKED}, {SCALE} and {SHAPE}")
    columns = int(shape[1])
    packed = words.view(torch.uint8)[:, : (columns + 1) // 2].contiguous()
    kind = "none" if inputs is None else "token" if inputs["dynamic"] else "static"
    if kind == "static" and get(INPUT_SCALE) is None:
        raise ConfigError(f"{source.path}: no {name}.{INPUT_SCALE}")
    bias = None if plain.bias is None else source.get(f"{name}.bias").to(dtype)
    bits = BITS if inputs is None else inputs["num_bits"]
    zero = get(INPUT_ZERO)
    return W4A4Linear(packed, scale, columns, kind, bits, get(INPUT_SCALE), zero, bias)


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise ConfigError("save_pretrained of a packed model: copy the folder that it was loaded from")
