"""Time a training step of Megatron's transformer block, standard and ladder, in two processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from link import Link


@dataclass(frozen=True)
class Variant:
    """One row of the benchmark."""

    name: str
    ladder: bool
    connected: bool = True
    """False: without communication, the bound."""
    synchronous: bool = False
    """True: the forward waits for each reduction at once, the control."""


STANDARD = Variant("standard", ladder=False)
LADDER = Variant("ladder", ladder=True)
CONTROL = Variant("ladder, waiting at once", ladder=True, synchronous=True)
STANDARD_BOUND = Variant("standard, no communication", ladder=False, connected=False)
LADDER_BOUND = Variant("ladder, no communication", ladder=True, connected=False)
BOUNDS = (STANDARD_BOUND, LADDER_BOUND)
OVER_A_LINK = (STANDARD, LADDER, CONTROL)


@dataclass(frozen=True)
class Shape:
    """The block and its input; the defaults reduce 1 MiB after each module."""

    layers: int = 4
    hidden_size: int = 512
    heads: int = 8
    sequence_length: int = 128
    batch_size: int = 4

    @property
    def modules(self) -> int:
        return 2 * self.layers

    @property
    def message_bytes(self) -> int:
        """Of one all-reduce, in fp32."""
        return 4 * self.sequence_length * self.batch_size * self.hidden_size


Times = dict[str, float]
"""Milliseconds: ``forward``, and ``step`` (forward and backward)."""


def build_block(shape: Shape, ladder: bool, ranks: int) -> Any:
    """Megatron's own transformer block of local layers, with the plugin or without."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn.functional import silu

    from megatron_plugins.ladder_residual import adjust_config
    from torch_plugins.config import LadderResidual

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        tensor_model_parallel_size=ranks,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=silu,
        persist_layer_norm=False,
    )
    if ladder:
        config.megatron_plugins = {LadderResidual.key(): LadderResidual()}
        adjust_config(config, LadderResidual())
    block = TransformerBlock(config, get_gpt_layer_local_spec(normalization="RMSNorm"))
    if all(hasattr(layer, "ladder") for layer in block.layers) != ladder:
        raise RuntimeError("the plugin is off: unset MEGATRON_PLUGINS_DISABLE")
    return block


class Bench:
    """The blocks of one rank, its link, and a step to time."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        import torch

        self.shape, self.link = shape, Link()
        self.blocks = {ladder: build_block(shape, ladder, ranks) for ladder in (False, True)}
        size = (shape.sequence_length, shape.batch_size, shape.hidden_size)
        self.hidden_states = torch.randn(size, requires_grad=True)
        self.gradient = torch.randn(size) / shape.hidden_size
        self.link.install()

    def time(self, variant: Variant) -> Times:
        """One forward and backward; all ranks start together."""
        import torch.distributed as dist

        block, link = self.blocks[variant.ladder], self.link
        link.connected = variant.connected
        dist.barrier()
        start = time.perf_counter()
        link.synchronous = variant.synchronous
        output = block(self.hidden_states, attention_mask=None)
        link.synchronous = False
        forward = time.perf_counter()
        output.backward(self.gradient)
        end = time.perf_counter()
        block.zero_grad()
        return {"forward": (forward - start) * 1000, "step": (end - start) * 1000}


def measure(shape: Shape, ratios: list[float], repetitions: int, ranks: int) -> list[Any]:
    """Interleaved measurements: every repetition runs every variant over every link.

    CPU speed drifts, so each repetition sets its links anew: an all-reduce takes ``ratio`` times
    the compute of a module, as the repetition's own run without communication measured it. Ratio 0
    is gloo as it is.

    Returns:
        Per repetition ``{"bounds": {variant: times}, "links": {ratio: {variant: times}}}``.
    """
    import torch
    import torch.distributed as dist

    bench = Bench(shape, ranks)
    for variant in (*BOUNDS, *OVER_A_LINK):
        bench.time(variant)
    records = []
    for repetition in range(repetitions):
        bounds = {variant.name: bench.time(variant) for variant in BOUNDS}
        module = torch.tensor(bounds[STANDARD_BOUND.name]["forward"] / 1000 / shape.modules)
        bench.link.connected = True
        dist.broadcast(module, 0)
        links = {}
        for ratio in ratios:
            bench.link.latency = ratio * module.item()
            first = repetition % len(OVER_A_LINK)
            order = OVER_A_LINK[first:] + OVER_A_LINK[:first]
            links[ratio] = {variant.name: bench.time(variant) for variant in order}
        bench.link.latency = 0.0
        records.append({"bounds": bounds, "links": links})
    bench.link.remove()
    return records
