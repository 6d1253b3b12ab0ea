"""Seconds that a module computes on one tensor-parallel rank: a roofline for each of its kernels.

A kernel takes the longer of ``FLOPs / rate`` and ``bytes / bandwidth``; kernels follow each other.
A module is its matrix products, the attention itself, and what is done element by element.
"""

from __future__ import annotations

from dataclasses import dataclass

from .constants import Constants
from .hardware import GPU
from .shapes import Shape

WIDTH = 2
"""Bytes of a weight or activation: bf16 or fp16."""


@dataclass(frozen=True)
class Engine:
    """What a program computes beyond what it must."""

    expanded_kv: bool = False
    """Keys and values are repeated for every query head before attention reads them."""
    whole_cache: bool = False
    """Attention reads the cache at its final length from the first token on."""
    replicated_head: bool = False
    """Every rank computes all logits."""
    every_logit: bool = False
    """Prefill computes the logits of every position, not of the last alone."""


SERVING = Engine()
"""What inference servers do."""

PAPER = Engine(True, True, True, True)
"""The paper's benchmark: ``KVCache``, ``repeat_interleave`` and ``output`` of
gpt_fast/gpt_ladder_TP.py in the authors' repository, mayank31398/ladder-residual-inference."""


@dataclass(frozen=True)
class Tokens:
    """One forward pass."""

    sequences: int
    new: int
    """Tokens of each sequence that pass through the model."""
    context: float
    """Tokens that each of them attends to, on average."""
    held: float
    """Tokens of each sequence in the cache that attention reads."""

    @property
    def count(self) -> int:
        return self.sequences * self.new


@dataclass(frozen=True)
class Kernel:
    flops: float
    bytes: float

    def seconds(self, gpu: GPU, constants: Constants) -> float:
        compute = self.flops / (gpu.flops * constants.matmul)
        return max(compute, self.bytes / (gpu.memory * constants.memory))


def linear(tokens: float, inputs: float, outputs: float) -> Kernel:
    """``[tokens, inputs] @ [inputs, outputs]``."""
    moved = inputs * outputs + tokens * (inputs + outputs)
    return Kernel(2 * tokens * inputs * outputs, WIDTH * moved)


def attention_kernels(shape: Shape, tp: int, tokens: Tokens, engine: Engine) -> list[Kernel]:
    """Norm and residual add, QKV product, attention, output product."""
    heads, kv_heads, _ = shape.per_rank(tp)
    queries, keys = heads * shape.head_dim, kv_heads * shape.head_dim
    read = queries if engine.expanded_kv else keys
    core_bytes = tokens.count * 2 * queries + tokens.sequences * tokens.held * 2 * read
    return [
        _elementwise(tokens.count * 5 * shape.hidden),
        linear(tokens.count, shape.hidden, queries + 2 * keys),
        _elementwise(tokens.count * (2 * queries + 4 * keys)),  # rotation, and into the cache
        Kernel(4 * tokens.count * tokens.context * queries, WIDTH * core_bytes),
        linear(tokens.count, queries, shape.hidden),
    ]


def mlp_kernels(shape: Shape, tp: int, tokens: Tokens) -> list[Kernel]:
    """Norm and residual add, gate and up product, their gated product, down product."""
    width = shape.per_rank(tp)[2]
    return [
        _elementwise(tokens.count * 5 * shape.hidden),
        linear(tokens.count, shape.hidden, 2 * width),
        _elementwise(tokens.count * 3 * width),
        linear(tokens.count, width, shape.hidden),
    ]


def head_kernels(shape: Shape, tp: int, tokens: Tokens, engine: Engine) -> list[Kernel]:
    """Final norm and logits."""
    count = tokens.count if engine.every_logit else tokens.sequences
    columns = shape.vocabulary if engine.replicated_head else shape.vocabulary / tp
    return [_elementwise(count * 2 * shape.hidden), linear(count, shape.hidden, columns)]


def _elementwise(values: float) -> Kernel:
    return Kernel(0.0, WIDTH * values)
