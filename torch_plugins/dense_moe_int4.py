"""DS-MoE's experts in four bits, for inference with a few of them.

:func:`pack_experts` quantizes the experts' matrices to the nearest codes, one scale for each row or
group, and keeps them beside the weights that they were made of; evaluation with some of the experts
then multiplies by them (:mod:`torch_plugins.ops.sparse_moe`), with inputs of ``input_bits`` and a
scale for each token. Training, evaluation with all experts, checkpoints and saving go on with the
weights.

Shapes: T tokens, D hidden size, N experts, F width of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError
from .dense_moe import Weights
from .native import active
from .ops.int4 import pack_int4
from .ops.sparse_moe import (
    activation_name,
    prepack_experts,
    w4a4_sparse_moe,
    w4a4_sparse_moe_prepacked,
)
from .weight_quant import round_to_nearest


class PackedExperts(nn.Module):
    """``sum over kept i of S_i down_i h_i`` by four-bit weights; has no gradient.

    Args:
        up: as :func:`torch_plugins.dense_moe.dense_mlp` takes it.
        down_DNF: ``[D, N F]``.
        experts: N.
        activation: silu, gelu (either) or relu, as a function or module.
        input_bits: 2 to 8.
        group_size: input features with one scale; -1: all.

    Raises:
        ConfigError: the activation is another, or the group size divides not both D and F.
    """

    def __init__(
        self,
        up: Weights,
        down_DNF: Tensor,
        experts: int,
        activation: Callable[[Tensor], Tensor],
        input_bits: int = 8,
        group_size: int = -1,
    ) -> None:
        super().__init__()
        self.gate_up: Tensor
        self.gate_up_scale: Tensor
        self.down: Tensor
        self.down_scale: Tensor
        name = activation_name(activation)
        if name is None:
            raise ConfigError(
                f"activation {activation!r}: experts in four bits have silu, gelu, gelu_tanh or "
                "relu"
            )
        matrices = (up,) if isinstance(up, Tensor) and up.dim() == 2 else tuple(up)
        self.activation, self.gated, self.input_bits = name, len(matrices) == 2, input_bits
        self.width = down_DNF.shape[1] // experts
        self.source = [(weight, _version(weight)) for weight in (*matrices, down_DNF)]
        by_expert = [matrix.detach().unflatten(0, (experts, -1)) for matrix in matrices]
        down_NDF = down_DNF.detach().unflatten(1, (experts, -1)).transpose(0, 1)
        self.prepacked = active("cpu") and down_DNF.device.type == "cpu"
        self._hold("gate_up", torch.cat(by_expert, 1), group_size)
        self._hold("down", down_NDF, group_size)

    def _hold(self, name: str, weight_NOI: Tensor, group_size: int) -> None:
        quantized = [round_to_nearest(weight, 4, group_size) for weight in weight_NOI]
        packed = torch.stack([pack_int4(each.codes_OI) for each in quantized])
        scales = torch.stack([each.scales_OG.float() for each in quantized])
        if self.prepacked:
            packed = prepack_experts(packed, scales, weight_NOI.shape[-1])
        else:
            self.register_buffer(f"{name}_scale", scales, persistent=False)
        self.register_buffer(name, packed, persistent=False)

    def forward(self, x_TD: Tensor, scores_TN: Tensor, kept_TN: Tensor) -> Tensor:
        if any(_version(weight) != version for weight, version in self.source):
            raise RuntimeError(
                "the experts' weights have changed since pack_experts: call it again"
            )
        rest = (self.gated, self.activation, self.input_bits)
        packed = (x_TD, scores_TN, kept_TN, self.gate_up)
        if self.prepacked:
            return w4a4_sparse_moe_prepacked(*packed, self.down, self.width, *rest)
        return w4a4_sparse_moe(*packed, self.gate_up_scale, self.down, self.down_scale, *rest)


def _version(weight: Tensor) -> int:
    """Counts changes in place, but of tensors that were made under ``torch.inference_mode``."""
    return 0 if weight.is_inference() else weight._version


def pack_experts(model: nn.Module, input_bits: int = 8, group_size: int = -1) -> int:
    """Give every layer of experts of ``model``, of Hugging Face's or of Megatron's, its own
    :class:`PackedExperts`. Call it again when weights have changed or moved.

    Returns:
        How many layers have them now.

    Raises:
        ConfigError: none has experts, or see :class:`PackedExperts`.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "expert_weights")]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layer with the experts of DS-MoE: nothing to pack"
        )
    if not 2 <= input_bits <= 8:
        raise ConfigError(f"input_bits {input_bits}: must be between 2 and 8")
    for layer in layers:
        up, down, experts, activation = layer.expert_weights()
        layer.packed = PackedExperts(up, down, experts, activation, input_bits, group_size)
    return len(layers)
