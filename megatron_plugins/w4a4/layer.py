"""Layers whose linears are converted as soon as they are built."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_plugins import unfused
from megatron_plugins.w4a4 import linears
from torch_plugins.config import W4A4

COUNTS: dict[int, int] = {}
"""Converted linears by layer, in this process."""


@cache
def quantized_layer_class(base: type) -> type:
    """A subclass of ``TransformerLayer`` with quantizing linears."""

    layer_class: Any = base

    class QuantizedLayer(layer_class):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            feature = config.megatron_plugins[W4A4.key()]
            index = self.layer_number - 1
            COUNTS[index] = linears.quantize_layer(self, feature, index)

    QuantizedLayer.__name__ = QuantizedLayer.__qualname__ = f"Quantized{base.__name__}"
    return QuantizedLayer


def quantized(spec: Any, feature: W4A4, index: int) -> Any:
    """A layer's spec with the selected linears converted, norms apart where inputs are quantized;
    unchanged where none is selected or all are already."""
    if not any(feature.selects(name) for name in names(index)):
        return spec
    if any(quantized_layer_class(base) is spec.module for base in spec.module.__mro__[1:2]):
        return spec
    submodules = spec.submodules
    if feature.activation_bits:
        if feature.selects(f"decoder.layers.{index}.self_attention.linear_qkv"):
            submodules = unfused.attention(submodules)
        if feature.selects(f"decoder.layers.{index}.mlp.linear_fc1") and _is_mlp(submodules.mlp):
            submodules = unfused.mlp(submodules, unfused.FC1_KEYS)
    return replace(spec, module=quantized_layer_class(spec.module), submodules=submodules)


def _is_mlp(spec: Any) -> bool:
    """Whether a layer's MLP is Megatron's ``MLP``, in either form of its spec."""
    if isinstance(spec, ModuleSpec):
        return isinstance(spec.module, type) and issubclass(spec.module, MLP)
    owner = getattr(getattr(spec, "func", spec), "__self__", None)
    return isinstance(owner, type) and issubclass(owner, MLP)


def names(index: int) -> list[str]:
    """What the linears of a layer can be called."""
    inner = ("linear_fc1", "linear_fc2")
    parts = [f"self_attention.{name}" for name in ("linear_qkv", "linear_kv", "linear_proj")]
    for mlp in ("mlp", "mlp.experts.local_experts.0", "mlp.shared_experts"):
        parts += [f"{mlp}.{name}" for name in inner]
    return [f"decoder.layers.{index}.{part}" for part in parts]
