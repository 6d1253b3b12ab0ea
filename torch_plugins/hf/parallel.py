"""Tensor parallelism of transformers, whose all-reduces a ladder hides in inference.

A row-parallel projection of transformers waits for the all-reduce of its partial sums. In a ladder
nothing reads the sum before the next module has run (arXiv 2501.06589, section 3), so there the
projection only starts it, by a functional collective of torch, and whatever reads the result first
waits: in a forward pass torch's ``AsyncCollectiveTensor`` does, and in a graph of ``torch.compile``
the inductor puts the wait there. The decoder adds a module's output once the next module has run.

The plan of the configuration stays in the names that every reader of it knows, such as DeepSpeed's
AutoTP; :func:`overlap` renames the projections of the ladder where transformers applies it. A
forward pass with gradients reduces as transformers does, and so does a transformers before
``_resolve_parallel_plans``.

Shapes: B batch, S tokens, I inner size of a module, D hidden size, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from .configuration_plugin_decoder import PluginDecoderConfig

STYLE = "ladder_rowwise"
"""Name of the style in transformers' registry, in which every plan is looked up."""


def _register() -> None:
    """Make transformers know the style, where it has tensor parallelism on DTensor."""
    try:
        from torch.distributed import _functional_collectives as collectives
        from torch.distributed.tensor import DTensor
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel
    except ImportError:
        return

    class LadderRowwise(RowwiseParallel):
        """``[B, S, I / T] -> [B, S, D]``, the all-reduce started where no gradient is wanted."""

        def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
            local = isinstance(module, nn.Linear) and not isinstance(output, DTensor)
            if not local or output.requires_grad:
                return super().transform_output_post_forward(module, output, mesh)
            group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
            bias = module._parameters.get("bias")
            if bias is not None:  # 1 / T of it on every rank: all ranks have one graph
                whole: Tensor = bias.to_local() if isinstance(bias, DTensor) else bias
                output = torch.add(output, whole, alpha=1 / group.size())
            return collectives.all_reduce(output, "sum", group)

    ALL_PARALLEL_STYLES.register(STYLE, LadderRowwise())


_register()


def check(config: PluginDecoderConfig, size: int) -> None:
    """Refuse what ``size`` processes cannot share.

    Raises:
        ConfigError: experts, ranks of Desync Residual, or a number of heads that ``size`` does not
            divide.
    """
    if size > 1 and config.dense_moe is not None:
        raise ConfigError(
            f"tp_size {size}: dense_moe has no tensor parallel plan, as scores and matrices would "
            "have to be divided alike; use pipeline parallelism, or device_map"
        )
    if size > 1 and config.desync_residual is not None:
        raise ConfigError(
            f"tp_size {size}: the ranks of desync_residual are computed in one process; use "
            "device_map"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % size:
            raise ConfigError(f"tp_size {size}: must divide {name} {getattr(config, name)}")


def overlap(model: Any, plan: dict[str, str]) -> dict[str, str]:
    """The plan in which the projections of a ladder start their all-reduces and do not wait.

    These are both of a ladder layer, and ``down_proj`` of a layer before one; such a ``down_proj``
    has its output handed over to the next layer, which adds it later. After a ladder layer without
    another behind it ``down_proj`` has nothing to hide behind, and waits.

    Args:
        model: the decoder with or without its head; its layers are told what to hand over.
        plan: style by name of a module or parameter, such as ``model.layers.3.mlp.down_proj``.
    """
    decoder, plan = model.base_model, dict(plan)
    prefix = "" if decoder is model else f"{model.base_model_prefix}."
    layers = list(decoder.layers)
    for index, layer in enumerate(layers):
        o_proj, down_proj = (
            f"{prefix}layers.{index}.{name}" for name in ("self_attn.o_proj", "mlp.down_proj")
        )
        if layer.ladder and plan.get(o_proj) == "rowwise":
            plan[o_proj] = STYLE
        before_ladder = index + 1 < len(layers) and layers[index + 1].ladder
        layer.hands_over = before_ladder and plan.get(down_proj) == "rowwise"
        if layer.hands_over:
            plan[down_proj] = STYLE
    return plan
