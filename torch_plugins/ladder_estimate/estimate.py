"""One cell of the estimate: a model on a cluster, with a batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from . import schedule
from .collective import Fabric, all_reduce
from .constants import FITTED, Constants
from .hardware import GPU, NCCL_START, Link, link
from .roofline import (
    SERVING,
    WIDTH,
    Engine,
    Kernel,
    Tokens,
    attention_kernels,
    head_kernels,
    mlp_kernels,
)
from .shapes import Shape

PROMPT, GENERATE = 1024, 512
"""The paper's benchmark: scripts/throughput-70B.sh of the authors' repository."""

VARIANTS = ("standard", "ladder", "parallel", "desync", "no communication")


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    tp: int
    inside: Link
    between: Link
    kind: str = "nvlink"
    """Of the link within a node."""
    nodes: int = 1
    measured: Link | None = None
    """In place of both: bus bandwidth of a large all-reduce, latency of a small one."""


def cluster(gpu: GPU, tp: int, kind: str, nodes: int = 1) -> Cluster:
    """Ranks joined by a link of one kind, and by InfiniBand between nodes; with ``kind`` "ib"
    every rank is its own node."""
    inside = link("nvlink" if kind == "ib" and gpu.nvlink else kind, gpu)
    return Cluster(gpu, tp, inside, link("ib", gpu), kind, tp if kind == "ib" else nodes)


@dataclass(frozen=True)
class Work:
    """What is asked of the cluster."""

    batch: int
    prompt: int = PROMPT
    generate: int = GENERATE
    engine: Engine = SERVING
    layers: Collection[int] | None = None
    """Ladder layers; None: all."""
    keep: int = 2
    """Desync residual: one in so many all-reduces is left."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one forward pass, by variant."""

    times: dict[str, float]
    reduce: float
    """Of one all-reduce."""


@dataclass(frozen=True)
class Estimate:
    prefill: Pass
    decode: Pass
    work: Work

    def seconds(self, variant: str) -> float:
        """Prefill, and every further token."""
        steps = max(0, self.work.generate - 1)
        return self.prefill.times[variant] + steps * self.decode.times[variant]

    def tokens_per_second(self, variant: str) -> float:
        """Generated tokens of the whole batch."""
        return self.work.batch * self.work.generate / self.seconds(variant)

    def speedup(self, variant: str) -> float:
        """Of tokens/s over the standard model."""
        return self.seconds("standard") / self.seconds(variant)

    def exposed(self, variant: str) -> float:
        """Share of the time in which nothing is computed."""
        return 1 - self.seconds("no communication") / self.seconds(variant)


def estimate(shape: Shape, machine: Cluster, work: Work, constants: Constants = FITTED) -> Estimate:
    """Prefill of the prompts, and decoding one token for each sequence, on average."""
    whole = work.prompt + work.generate
    held = whole if work.engine.whole_cache else work.prompt + work.generate / 2
    prefill = Tokens(work.batch, work.prompt, work.prompt / 2, work.prompt)
    decode = Tokens(work.batch, 1, held, held)
    return Estimate(
        forward(shape, machine, work, prefill, constants),
        forward(shape, machine, work, decode, constants),
        work,
    )


def forward(
    shape: Shape, machine: Cluster, work: Work, tokens: Tokens, constants: Constants
) -> Pass:
    """One forward pass of the whole model."""

    def seconds(kernels: list[Kernel]) -> float:
        busy = sum(kernel.seconds(machine.gpu, constants) for kernel in kernels)
        return busy + constants.module

    attention = seconds(attention_kernels(shape, machine.tp, tokens, work.engine))
    compute = [attention, seconds(mlp_kernels(shape, machine.tp, tokens))] * shape.layers
    one = all_reduce(WIDTH * tokens.count * shape.hidden, fabric(machine, constants))
    reduce = [one] * len(compute)
    head = seconds(head_kernels(shape, machine.tp, tokens, work.engine))
    times = {
        "standard": schedule.standard(compute, reduce),
        "ladder": schedule.ladder(compute, reduce, constants.contention, work.layers),
        "parallel": schedule.parallel(compute, reduce),
        "desync": schedule.desync(compute, reduce, work.keep),
        "no communication": sum(compute),
    }
    return Pass({name: time + head for name, time in times.items()}, one)


def memory(shape: Shape, tp: int, work: Work) -> float:
    """Bytes of weights and of the full cache on one rank."""
    kv = 2 * shape.per_rank(tp)[1] * shape.head_dim * shape.layers
    cache = work.batch * (work.prompt + work.generate) * kv
    return WIDTH * (shape.parameters / tp + cache)


def fabric(machine: Cluster, constants: Constants) -> Fabric:
    """The links as measured, or as data sheets and ``constants`` have them."""
    if machine.measured is not None:
        wire = Link(machine.measured.bandwidth, 0.0, 0.0)
        return Fabric(machine.tp, 1, wire, wire, machine.measured.latency)
    found = constants.of_link(machine.kind)
    inside = replace(
        machine.inside,
        bandwidth=machine.inside.bandwidth * found.share,
        latency=machine.inside.latency * found.step,
        tree_latency=machine.inside.tree_latency * found.step,
    )
    start = NCCL_START + found.start
    return Fabric(machine.tp, machine.nodes, inside, machine.between, start)
