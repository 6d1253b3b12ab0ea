"""One process of the benchmark: every row with so many threads. ``bench.py`` starts it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import fused
import linear
import moe
import torch
from arms import Row, Tell, Unavailable
from limits import Limits, measure
from machine import caches, pin
from peers_ggml import library
from progress import Progress
from settings import Settings, numbers
from timing import Effort

from torch_plugins import native


def worker(settings: Settings, peers: str, threads: int, path: Path) -> None:
    """Measure with so many threads, in this process, and write down what was found."""
    pin(threads)
    progress = Progress(threads)
    progress.tell("the limits of the machine")
    limits = measure(threads, caches().get("L3", 0))
    progress.limits(limits)
    torch.set_num_threads(threads)
    torch._logging.set_logs(all=logging.ERROR)
    found = []
    for row in rows(settings, peers, limits, progress.tell):
        found.append(row)
        progress.row(row)
    progress.stop()
    result = {"limits": asdict(limits), "rows": found}
    result |= {"left_out": progress.left_out, "wrong": progress.wrong}
    path.write_text(json.dumps({**result, "versions": versions()}))


def rows(settings: Settings, peers: str, limits: Limits, tell: Tell) -> Iterator[Row]:
    """The rows of every operator that is asked for, as they are measured."""
    rest = Effort(settings.seconds, fewest=settings.rounds), limits, tell
    if "linear" in settings.operators:
        shapes = [numbers(shape, 2) for shape in settings.shapes]
        tokens = {"warm": settings.tokens, "cold": settings.cold}
        tokens = {state: each for state, each in tokens.items() if each}
        with torch.inference_mode():
            yield from linear.rows(linear.chosen(peers == "all"), shapes, tokens, *rest)
    if "moe" in settings.operators:
        shapes = [numbers(shape, 4) for shape in settings.moe_shapes]
        with torch.inference_mode():
            yield from moe.rows(shapes, settings.moe_tokens, *rest)
    if "fake-quant" in settings.operators:
        yield from fused.fake_quant_rows(settings.elements, peers != "eager", *rest)
    if "norm" in settings.operators:
        with torch.inference_mode():
            yield from fused.norm_rows(settings.rows, peers != "eager", *rest)


def versions() -> dict[str, str]:
    """Of what is compared, where it is installed, and which native library is active."""
    found = {"native": native.load()["cpu"]}
    for name in ("torch", "transformers", "torchao", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with contextlib.suppress(Unavailable):
        found["ggml"] = library().ggml_version().decode()
    return found


if __name__ == "__main__":
    given, kind, count, result_path = sys.argv[1:]
    worker(Settings(**json.loads(Path(given).read_text())), kind, int(count), Path(result_path))
