"""Time steps of Megatron's models, interleaved, on the processes of one tensor-parallel group."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import link as links
from timeline import Watch
from variants import (
    BOUNDS,
    OVER_A_LINK,
    STANDARD_BOUND,
    Shape,
    Variant,
    build_block,
    build_model,
)

Times = dict[str, float]
"""Milliseconds by phase."""
MODES = ("training", "sequence parallel", "inference")
TOKENS = 4
"""Decoded after a prefill."""


class Training:
    """Forward and backward of a transformer block; phases ``forward`` and ``step``, or with
    sequence parallelism ``sp forward`` and ``sp step``."""

    def __init__(self, shape: Shape, ranks: int, sequence_parallel: bool) -> None:
        import torch

        kinds = ["standard", "desync", "ladder"] + ([] if sequence_parallel else ["parallel"])
        self.prefix = "sp " if sequence_parallel else ""
        self.models = {kind: build_block(shape, kind, ranks, sequence_parallel) for kind in kinds}
        parts = ranks if sequence_parallel else 1
        size = (shape.sequence_length // parts, shape.batch_size, shape.hidden_size)
        self.hidden_states = torch.randn(size, requires_grad=True)
        self.gradient = torch.randn(size) / shape.hidden_size
        self.scale = 1.0

    def run(self, kind: str) -> Times:
        start = time.perf_counter()
        output = self.models[kind](self.hidden_states, attention_mask=None)
        forward = time.perf_counter()
        output.backward(self.gradient)
        end = time.perf_counter()
        self.models[kind].zero_grad()
        times = {"forward": forward - start, "step": end - start}
        return {self.prefix + phase: 1000 * seconds for phase, seconds in times.items()}


class Inference:
    """A GPT with a static context: ``prefill`` of the prompts, ``decode`` of a few tokens."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        import torch

        self.shape = shape
        kinds = ("standard", "parallel", "desync", "ladder")
        self.models = {kind: build_model(shape, kind, ranks) for kind in kinds}
        self.tokens = torch.randint(0, 512, (shape.batch_size, shape.sequence_length + TOKENS))

    def run(self, kind: str) -> Times:
        import torch
        from megatron.core.inference.contexts import StaticInferenceContext

        length = self.shape.sequence_length
        context = StaticInferenceContext(self.shape.batch_size, length + TOKENS)
        times = []
        with torch.no_grad():
            for start, end in ((0, length), *((i, i + 1) for i in range(length, length + TOKENS))):
                context.sequence_len_offset = start
                part, begin = slice(start, end), time.perf_counter()
                positions = torch.arange(start, end).expand(self.shape.batch_size, -1)
                self.models[kind](self.tokens[:, part], positions, None, inference_context=context)
                times.append(1000 * (time.perf_counter() - begin))
        return {"prefill": times[0], "decode": sum(times[1:]) / TOKENS}


def make(mode: str, shape: Shape, ranks: int) -> Any:
    if mode == "inference":
        return Inference(shape, ranks)
    return Training(shape, ranks, mode == "sequence parallel")


class Bench:
    """The models of one rank over its link."""

    def __init__(self, mode: str, shape: Shape, ranks: int) -> None:
        self.shape, self.link = shape, links.install()
        self.work = make(mode, shape, ranks)
        self.variants = [variant for variant in OVER_A_LINK if variant.kind in self.kinds]

    def remove(self) -> None:
        links.remove(self.link)

    @property
    def kinds(self) -> Sequence[str]:
        return tuple(self.work.models)

    def time(self, variant: Variant) -> Times:
        """All ranks start together."""
        import torch.distributed as dist

        self.link.connected, self.link.synchronous = variant.connected, variant.synchronous
        dist.barrier()
        try:
            return self.work.run(variant.kind)
        finally:
            self.link.connected, self.link.synchronous = True, False


def modules_of(bench: Bench) -> dict[str, list[float]]:
    """Milliseconds of each module's compute in the standard model, in the order in which they run;
    ``forward`` is the prefill where there is a ``decode``."""
    model = bench.work.models["standard"]
    watch = Watch(getattr(model, "decoder", model))
    bench.time(STANDARD_BOUND)
    watch.remove()
    taken = [(span["name"], 1000 * (span["end"] - span["start"])) for span in watch.spans]
    backward = [time for name, time in taken if name.endswith("backward")]
    forward = [time for name, time in taken if not name.endswith("backward")]
    first = forward[: 2 * bench.shape.layers]
    found = {"forward": first, "backward": backward}
    return found | ({"decode": forward[-len(first) :]} if len(forward) > len(first) else {})


def measure(
    bench: Bench,
    ratios: list[float],
    repetitions: int,
    modules: int,
    set_link: Callable[[float], None],
    say: Callable[[str], None],
) -> list[Any]:
    """Interleaved measurements: every repetition runs every variant over every link.

    CPU speed drifts, so each repetition sets its links anew: an all-reduce takes ``ratio`` times
    the compute of a module in the forward (prefill, and for decoding the decode), as the
    repetition's own run without communication measured it. Ratio 0 is the network as it is.

    Args:
        set_link: is told how many seconds an all-reduce of the forward shall take.

    Returns:
        Per repetition ``bounds``, times by variant; ``modules``, compute by module; and ``links``,
        times by phase, ratio and variant: a link's phase is the one whose compute it was set by.
    """
    import torch
    import torch.distributed as dist

    for variant in (*BOUNDS, *bench.variants):
        bench.time(variant)
        bench.time(variant)  # from the second on, a ladder layer knows the one that follows it
    records = []
    for repetition in range(repetitions):
        bounds = {variant.name: bench.time(variant) for variant in BOUNDS}
        computes = modules_of(bench)
        phases = [phase for phase in bounds[STANDARD_BOUND.name] if not phase.endswith("step")]
        links: dict[str, Any] = {phase: {} for phase in phases}
        for phase in phases:
            module = torch.tensor(bounds[STANDARD_BOUND.name][phase] / 1000 / modules)
            dist.broadcast(module, 0)
            for ratio in ratios:
                set_link(ratio * module.item())
                first = repetition % len(bench.variants)
                order = bench.variants[first:] + bench.variants[:first]
                links[phase][str(ratio)] = {v.name: bench.time(v) for v in order}
        set_link(0.0)
        records.append({"bounds": bounds, "modules": computes, "links": links})
        say(f"repetition {repetition + 1} of {repetitions}")
    return records
