"""Megatron's tensor-parallel linears with fake-quantized inputs and a penalty on their outputs.

A layer is built as its spec says, and its linears become subclasses of their own classes, in place:
whatever built them (attention, MLP, experts, another plugin) calls them as ever. A linear's clips
are parameters of its submodule ``input_quantizer``, so that they are stored beside its weight.

Every process of tensor parallelism has the clips. Their gradients are the same in all where all
have the whole input; where each has a part of the tokens or of the features, Megatron adds them up
once per step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_plugins.w4a4.penalty import Micro, Penalty, halves, heads, whole
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.ops.dynamic_quant import fake_quant_fp4, fake_quant_rows
from torch_plugins.w4a4.quantizer import InputQuantizer, check_blocks

COLUMN = ("ColumnParallelLinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear")
ROW = ("RowParallelLinear", "TERowParallelLinear")
FUSED = "TELayerNormColumnParallelLinear"
"""Normalizes its input itself: what it multiplies is never seen."""


def quantize_layer(layer: Any, feature: W4A4, index: int) -> int:
    """Convert the selected linears of a layer that was just built; returns how many there are.

    Args:
        index: of the layer in the whole model.

    Raises:
        ConfigError: a linear cannot be converted.
    """
    micro = Micro()
    if feature.kurtosis_weight:
        layer.register_forward_pre_hook(_count_tokens(layer.config, micro), with_kwargs=True)
    found = 0
    for name, module in layer.named_modules():
        if is_linear(module) and feature.selects(f"decoder.layers.{index}.{name}"):
            _convert(module, name, layer, feature, micro, f"decoder.layers.{index}.{name}")
            found += 1
    return found


def _count_tokens(config: Any, micro: Micro) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        processes = config.tensor_model_parallel_size if config.sequence_parallel else 1
        micro.tokens = hidden[..., 0].numel() * processes

    return hook


def is_linear(module: nn.Module) -> bool:
    return bool(_names(module).intersection(COLUMN + ROW))


def _names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def _convert(
    linear: Any, name: str, layer: Any, feature: W4A4, micro: Micro, full_name: str
) -> None:
    names, config = _names(linear), layer.config
    column, expert = bool(names.intersection(COLUMN)), bool(getattr(linear, "is_expert", False))
    if FUSED in names and feature.activation_bits:
        raise ConfigError(
            f"{W4A4.flag()}: {full_name} contains the norm, and what it multiplies cannot be "
            "quantized; use Megatron's own GPT layers, where the two are taken apart"
        )
    # TransformerEngine's linears keep Megatron's group beside their own attribute of that name.
    group = linear._tp_group if hasattr(linear, "_tp_group") else linear.tp_group
    width = linear.weight.shape[1]
    check_blocks(feature, width, full_name)
    parts = not column and group.size() > 1
    base: Any = type(linear)
    linear.__class__ = quantized_class(base)
    linear.w4a4, linear.w4a4_group = feature, group if parts else None
    linear.input_quantizer = linear.penalty = None
    if feature.activation_bits:
        linear.input_quantizer = _quantizer(linear, feature, group, column, expert, config)
    if feature.kurtosis_weight:
        topk = config.moe_router_topk if expert else None
        kinds, split = _projections(name, layer)
        linear.penalty = Penalty(feature, config, kinds, split, column, group, micro, topk)


def _quantizer(
    linear: Any, feature: W4A4, group: Any, column: bool, expert: bool, config: Any
) -> InputQuantizer:
    parts = not column and group.size() > 1
    largest = _largest(group) if parts else None
    if feature.grid == "nvfp4" and group.size() > 1 and config.sequence_parallel and not expert:
        largest = _largest(group)  # one scale for the tensor, of which each has some tokens
    weight = linear.weight
    quantizer = InputQuantizer(feature, weight.dtype, weight.device, largest)
    for clip in quantizer.parameters():
        shared: Any = clip
        shared.allreduce = getattr(weight, "allreduce", True)
        if expert or group.size() == 1:
            continue
        if config.sequence_parallel:
            shared.sequence_parallel = True  # summed by Megatron once per step
        elif parts:
            shared.average_gradients_across_tp_domain = True  # averaged: see below
            clip.register_hook(_times(group.size()))
    return quantizer


def _times(processes: int) -> Any:
    """Makes a sum of an average."""
    return lambda gradient: gradient * processes


def _largest(group: Any) -> Any:
    def largest(size: Tensor) -> Tensor:
        size = size.clone()
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=group)
        return size

    return largest


@cache
def quantized_class(base: type) -> type:
    """A subclass of a tensor-parallel linear; its new attributes are set by :func:`_convert`."""

    linear_class: Any = base

    class Quantized(linear_class):
        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = input_ if self.input_quantizer is None else self.input_quantizer(input_)
            output, bias = super().forward(x, *args, **kwargs)
            return (output if self.penalty is None else self.penalty(output, bias)), bias

        def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            weight = fake_quant_weight(weight, self.w4a4, self.w4a4_group)
            return super()._forward_impl(input, weight, *args, **kwargs)

    Quantized.__name__ = Quantized.__qualname__ = f"Quantized{base.__name__}"
    return Quantized


def fake_quant_weight(weight_OI: Tensor, feature: W4A4, group: Any) -> Tensor:
    """The weight in few bits, with its own gradient.

    Args:
        group: the processes that have parts of its columns, or None.
    """
    if not feature.weight_bits:
        return weight_OI
    size = weight_OI.detach().abs()
    if feature.grid != "int4":
        largest = _largest(group)(size.amax()) if group is not None else None
        return fake_quant_fp4(weight_OI, feature.grid, largest)
    if feature.weight_group_size != -1:
        groups = weight_OI.unflatten(1, (-1, feature.weight_group_size))
        return fake_quant_rows(groups, feature.weight_bits).flatten(1)
    largest = _largest(group)(size.amax(1, keepdim=True)) if group is not None else None
    return fake_quant_rows(weight_OI, feature.weight_bits, largest)


def _projections(name: str, layer: Any) -> Any:
    """Names of the projections in a linear's output, and how to take them apart."""
    config, last = layer.config, name.rpartition(".")[2]
    attention = layer.self_attention
    if last in ("linear_qkv", "linear_kv"):
        head, groups = config.kv_channels, config.num_query_groups
        queries = config.num_attention_heads // groups
        if last == "linear_kv":
            return ("k", "v"), heads(0, head)
        rows = attention.linear_qkv.weight.shape[0]
        if rows * attention.world_size == head * config.num_attention_heads:
            return ("q",), whole
        return ("q", "k", "v"), heads(queries, head)
    if last == "linear_fc1" and config.gated_linear_unit:
        return ("gate", "up"), halves
    return ({"linear_proj": "o", "linear_fc1": "up", "linear_fc2": "down"}[last],), whole
