"""Cache bytes and decoding speed of one small model with GQA, CLA2 and CLA3, 1K to 32K tokens.

    python examples/cross_layer_attention/bench_decode.py            # about 90 seconds
    python examples/cross_layer_attention/bench_decode.py --quick    # a toy, to see it work

The decoder of ``torch_plugins.hf`` with random weights on the CPU, and both of transformers' kinds
of cache: dynamic, which copies what it holds at every token, and static, which writes in place. The
cache starts full of random keys and values: what they are does not change the time. The three
models take turns, a few tokens each; ratios are medians of quotients taken within a turn. One
thread decodes, and its own time is counted, so that other programs on the machine matter little.
Prints a table; writes ``decode.json`` and ``decode.png``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

OUTPUT = Path(__file__).resolve().parents[2] / "out" / "bench_decode"
ARMS: dict[str, dict[str, int] | None] = {
    "GQA": None,
    "CLA2": {"sharing_factor": 2},
    "CLA3": {"sharing_factor": 3},
}
CACHES = ("dynamic", "static")
COLOURS = {"GQA": "#4C72B0", "CLA2": "#DD8452", "CLA3": "#55A868"}


@dataclass(frozen=True)
class Settings:
    """The model, in fp32, and how long to measure."""

    layers: int = 12
    hidden_size: int = 256
    heads: int = 8
    key_value_heads: int = 2
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    tokens: int = 4
    """That a model decodes in its turn."""
    most_turns: int = 40
    seconds: float = 9.0
    """For one row, of three turns or more."""


QUICK = Settings(layers=6, hidden_size=64, heads=4, contexts=(64, 256), seconds=0.1)


def build(settings: Settings, arm: str) -> Any:
    import torch

    from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM

    torch.manual_seed(0)
    config = PluginDecoderConfig(
        vocab_size=1024,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=2 * max(settings.contexts),
        cross_layer_attention=ARMS[arm],
    )
    return PluginDecoderForCausalLM(config).eval()


def filled_cache(model: Any, kind: str, context: int, room: int) -> Any:
    """A cache that holds ``context`` tokens and, if static, has room for ``room`` more."""
    import torch
    from transformers import DynamicCache, StaticCache

    config = model.config
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=context + room)
    else:
        cache = DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    key, value = torch.randn(shape), torch.randn(shape)
    for layer in sorted(set(config.kv_producers)):
        cache.update(key, value, layer)
    return cache


def stored_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.nbytes for tensor in tensors)


def decode(model: Any, cache: Any, tokens: int) -> float:
    """Greedily decode, and return the seconds that this thread ran, per token."""
    import torch

    token = torch.zeros(1, 1, dtype=torch.long)
    start = time.thread_time()
    for _ in range(tokens):
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return (time.thread_time() - start) / tokens


def take_turns(
    settings: Settings, models: dict[str, Any], caches: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds per token of every arm, one for each turn; who begins changes from turn to turn."""
    import torch

    times: dict[str, list[float]] = {arm: [] for arm in models}
    start = time.thread_time()
    with torch.inference_mode():
        for turn in range(settings.most_turns):
            arms = list(models)[turn % len(models) :] + list(models)[: turn % len(models)]
            for arm in arms:
                times[arm].append(decode(models[arm], caches[arm], settings.tokens))
            if turn >= 3 and time.thread_time() - start > settings.seconds:
                break
    return {arm: each[1:] for arm, each in times.items()}  # the first one warms up


def measure(settings: Settings, models: dict[str, Any], kind: str, context: int) -> dict[str, Any]:
    """One row: bytes, tokens per second and ratios of every arm at one context."""
    room = settings.tokens * settings.most_turns
    caches = {arm: filled_cache(model, kind, context, room) for arm, model in models.items()}
    stored = {arm: stored_bytes(cache) for arm, cache in caches.items()}
    times = take_turns(settings, models, caches)
    ratios = {
        arm: median(base / own for base, own in zip(times["GQA"], times[arm], strict=True))
        for arm in models
    }
    return {
        "cache": kind,
        "context": context,
        "bytes": stored,
        "tokens_per_second": {arm: 1 / median(times[arm]) for arm in models},
        "speedup": ratios,
        "seconds": times,
    }


def run(settings: Settings) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    models = {arm: build(settings, arm) for arm in ARMS}
    return [
        measure(settings, models, kind, context) for context in settings.contexts for kind in CACHES
    ]


def print_table(rows: list[dict[str, Any]], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    for kind in CACHES:
        table = Table(
            title=f"{kind} cache: {settings.layers} layers of {settings.hidden_size}, "
            f"{settings.heads} heads, {settings.key_value_heads} of keys and values, fp32"
        )
        table.add_column("context", justify="right")
        for what in ("MiB", "tok/s"):
            for arm in ARMS:
                table.add_column(f"{arm}\n{what}", justify="right")
        for arm in list(ARMS)[1:]:
            table.add_column(f"{arm}\n/ GQA", justify="right")
        for row in (row for row in rows if row["cache"] == kind):
            table.add_row(
                f"{row['context']:,}",
                *(f"{row['bytes'][arm] / 2**20:.1f}" for arm in ARMS),
                *(f"{row['tokens_per_second'][arm]:.1f}" for arm in ARMS),
                *(f"{row['speedup'][arm]:.2f}" for arm in list(ARMS)[1:]),
            )
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes of the cache, and speed over GQA, against the context."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), dpi=150, layout="constrained")
    for kind in CACHES:
        points = [row for row in rows if row["cache"] == kind]
        contexts = [row["context"] for row in points]
        for arm in ARMS:
            style = {"color": COLOURS[arm], "linestyle": "-" if kind == "dynamic" else ":"}
            style["marker"] = "o" if kind == "dynamic" else "x"
            if arm != "GQA":
                ratios = [row["speedup"][arm] for row in points]
                right.plot(contexts, ratios, label=f"{arm}, {kind}", **style)
            if kind == "dynamic":
                stored = [row["bytes"][arm] / 2**20 for row in points]
                left.plot(contexts, stored, label=arm, **style)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    left.set_ylabel("MiB of keys and values")
    left.set_title("cache")
    right.axhline(1, color=COLOURS["GQA"], linewidth=1.2)
    right.set_ylabel("tokens per second / those of GQA")
    right.set_title("decoding speed")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{c // 1024}K" if c >= 1024 else str(c) for c in contexts])
        axes.set_xlabel("context (tokens)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a toy model and short contexts")
    parser.add_argument(
        "--seconds", type=float, help=f"for each row; default: {Settings.seconds:g}"
    )
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    if arguments.seconds:
        settings = replace(settings, seconds=arguments.seconds)
    rows = run(settings)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {"settings": asdict(settings), "rows": rows}
    (arguments.output / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, arguments.output / "decode.png")
    print_table(rows, settings)
    print(f"written: {arguments.output}/decode.json, decode.png")


if __name__ == "__main__":
    main()
