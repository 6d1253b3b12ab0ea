"""A timeline of one training step, standard and ladder: each collective over what hides it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from variants import LADDER, STANDARD, Shape, Variant

LANES = ("compute", "link", "waiting")
RATIO = 1.0
"""Time of an all-reduce over compute of a module."""


class Watch:
    """Hooks that note when the modules of a block compute."""

    def __init__(self, block: Any) -> None:
        self.spans: list[dict[str, Any]] = []
        self.begun: dict[str, float] = {}
        self.handles: list[Any] = []
        for index, layer in enumerate(block.layers):
            modules = (
                (f"attention {index}", layer.self_attention, "linear_qkv", "linear_proj"),
                (f"MLP {index}", layer.mlp, "linear_fc1", "linear_fc2"),
            )
            for name, module, column, row in modules:
                self.handles += [
                    module.register_forward_pre_hook(partial(self._begin, name)),
                    module.register_forward_hook(partial(self._end, name)),
                    getattr(module, row).register_forward_hook(partial(self._watch, name)),
                    getattr(module, column).weight.register_post_accumulate_grad_hook(
                        partial(self._end, f"{name} backward")
                    ),
                ]

    def _begin(self, name: str, *_: Any) -> None:
        self.begun[name] = time.perf_counter()

    def _end(self, name: str, *_: Any) -> None:
        start = self.begun.pop(name)
        self.spans.append(_span(name, "compute", start, time.perf_counter()))

    def _watch(self, name: str, module: Any, args: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(partial(self._begin, f"{name} backward"))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _span(name: str, lane: str, start: float, end: float) -> dict[str, Any]:
    return {"name": name, "lane": lane, "start": start, "end": end}


def trace(bench: Any, set_link: Callable[[float], None], shape: Shape) -> dict[str, Any]:
    """Chrome trace events of one step of each variant, of this rank, in microseconds."""
    import torch
    import torch.distributed as dist
    from variants import STANDARD_BOUND

    times = [bench.time(STANDARD_BOUND)["forward"] for _ in range(5)]
    module = torch.tensor(median(times) / 1000 / shape.modules)
    dist.broadcast(module, 0)
    set_link(RATIO * module.item())
    events: list[dict[str, Any]] = []
    for process, variant in enumerate((STANDARD, LADDER)):
        events += _events(process, variant, _one_step(bench, variant))
    set_link(0.0)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _one_step(bench: Any, variant: Variant) -> list[dict[str, Any]]:
    watch = Watch(bench.work.models[variant.kind])
    bench.link.transfers = []
    bench.time(variant)
    watch.remove()
    transfers, bench.link.transfers = bench.link.transfers, None
    spans = list(watch.spans)
    for transfer in transfers:
        spans.append(_span(transfer.what, "link", transfer.starts, transfer.arrives))
        for start, end in transfer.waits:
            spans.append(_span(f"wait for {transfer.what}", "waiting", start, end))
    return spans


def _events(process: int, variant: Variant, spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    origin = min(span["start"] for span in spans)
    named = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": variant.name}}]
    for lane, name in enumerate(LANES):
        of: dict[str, Any] = {"ph": "M", "pid": process, "tid": lane, "name": "thread_name"}
        named.append({**of, "args": {"name": name}})
    return named + [
        {
            "ph": "X",
            "pid": process,
            "tid": LANES.index(span["lane"]),
            "name": span["name"],
            "ts": 1e6 * (span["start"] - origin),
            "dur": 1e6 * (span["end"] - span["start"]),
        }
        for span in sorted(spans, key=lambda span: span["start"])
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    events = found["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    figure, panels = plt.subplots(
        len(names),
        1,
        figsize=(11, 1.9 * len(names) + 0.8),
        dpi=150,
        sharex=True,
        layout="constrained",
    )
    colours = {"attention": "#4C72B0", "MLP": "#55A868"}
    for axes, (process, name) in zip(panels, names.items(), strict=True):
        for event in events:
            if event["ph"] != "X" or event["pid"] != process:
                continue
            lane = len(LANES) - 1 - event["tid"]
            kind = event["name"].split()[0]
            colour = colours.get(kind, "#DD8452" if event["tid"] == 1 else "#C44E52")
            box = (event["ts"] / 1000, event["dur"] / 1000)
            axes.broken_barh(
                [box], (lane - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.4
            )
            if event["tid"] == 0:
                short = kind[0].upper() + event["name"].split()[1]
                middle = box[0] + box[1] / 2
                axes.text(middle, lane, short, ha="center", va="center", fontsize=6, color="white")
        axes.set_yticks(range(len(LANES)), LANES[::-1], fontsize=8)
        axes.set_title(name, fontsize=10, loc="left")
    panels[-1].set_xlabel("milliseconds of one training step, forward and backward")
    figure.suptitle(
        "An all-reduce takes as long as a module's forward. A: attention, M: MLP", fontsize=10
    )
    figure.savefig(path)
    plt.close(figure)
