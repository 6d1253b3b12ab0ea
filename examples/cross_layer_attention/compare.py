"""Loss against cache size: MQA, MQA with half the head size, and CLA2, trained on real text.

    python examples/cross_layer_attention/compare.py            # minutes on two cores
    python examples/cross_layer_attention/compare.py --quick    # a toy, to see every step

Half the head size and CLA2 halve the key-value cache alike; which costs less? Every arm gets the
best learning rate of its own grid (the paper finds that CLA wants a higher one), then fresh seeds.
Prints a table; writes ``compare.json`` and ``compare.png``. ``--resume`` keeps the runs that an
interrupted call has finished.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from arms import ARMS, QUICK, Settings, prepare_tokens, train

from torch_plugins.config import CrossLayerAttention
from torch_plugins.cross_layer_attention import kv_bytes_per_token

OUTPUT = Path(__file__).resolve().parents[2] / "out" / "cross_layer_attention"
COLOURS = dict(zip(ARMS, ("#4C72B0", "#55A868", "#DD8452"), strict=True))


def cache_bytes(settings: Settings, name: str) -> int:
    """Per token, in 16 bits."""
    section = ARMS[name].cross_layer_attention or {"sharing_factor": 1}
    producers = CrossLayerAttention.from_dict(section).resolve(settings.layers)
    return kv_bytes_per_token(producers, 1, ARMS[name].head_dim)


class Runs:
    """Trainings, several at once, each written down when it ends.

    Args:
        path: one JSON line per run.
        resume: start from the runs that are there already, if their settings are these; the grid
            and the seeds may be others.
    """

    def __init__(self, settings: Settings, tokens: Path, path: Path, resume: bool) -> None:
        self.settings, self.tokens, self.path = settings, tokens, path
        fields = asdict(settings).items()
        self.identity = {k: v for k, v in fields if k not in ("learning_rates", "seeds")}
        old = path.read_text().splitlines() if resume and path.exists() else []
        self.done = [r for r in map(json.loads, old) if r["settings"] == self.identity]
        path.write_text("".join(json.dumps(run) + "\n" for run in self.done))

    def of(self, jobs: list[tuple[str, float, int]], pool: Executor) -> list[dict[str, Any]]:
        """The runs of ``jobs``, (arm, learning rate, seed) each; those missing are trained."""
        found = {(r["arm"], r["rate"], r["seed"]) for r in self.done}
        missing = [job for job in jobs if job not in found]
        futures = [pool.submit(train, self.settings, *job, self.tokens) for job in missing]
        for future in as_completed(futures):
            self.done.append(future.result() | {"settings": self.identity})
            with self.path.open("a") as file:
                file.write(json.dumps(self.done[-1]) + "\n")
            print("{arm:<16} lr {rate:<6g} seed {seed}: {loss:.4f}".format(**self.done[-1]))
        return [r for r in self.done if (r["arm"], r["rate"], r["seed"]) in jobs]


def run(settings: Settings, runs: Runs, workers: int) -> list[dict[str, Any]]:
    """The grid with seed 0, then every arm's best learning rate with the other seeds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        grid = runs.of([(arm, rate, 0) for arm in ARMS for rate in settings.learning_rates], pool)
        best = {arm: best_rate(grid, arm) for arm in ARMS}
        seeds = itertools.product(settings.seeds, ARMS)
        return grid + runs.of([(arm, best[arm], seed) for seed, arm in seeds], pool)


def best_rate(runs: list[dict[str, Any]], arm: str) -> float:
    grid = [run for run in runs if run["arm"] == arm and run["seed"] == 0]
    return min(grid, key=lambda run: run["loss"])["rate"]


def summarise(settings: Settings, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm. ``difference`` is to MQA, seed by seed."""
    fresh = {(r["arm"], r["seed"]): r["loss"] for r in runs if r["seed"] != 0}
    first = next(iter(ARMS))
    rows = []
    for arm in ARMS:
        losses = [fresh[arm, seed] for seed in settings.seeds]
        rate = best_rate(runs, arm)
        rows.append(
            {
                "arm": arm,
                "bytes": cache_bytes(settings, arm),
                "parameters": next(r["parameters"] for r in runs if r["arm"] == arm),
                "rate": rate,
                "at_the_edge": rate in (settings.learning_rates[0], settings.learning_rates[-1]),
                "losses": losses,
                "difference": [fresh[arm, s] - fresh[first, s] for s in settings.seeds],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    tokens = settings.steps * settings.batch_size * settings.sequence_length
    table = Table(title=f"{settings.layers} layers of {settings.hidden_size}, {tokens:,} tokens")
    table.add_column("arm", no_wrap=True)
    for column in ("bytes", "parameters", "lr", "loss", "ppl", "to MQA", "by seed"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        loss = mean(row["losses"])
        table.add_row(
            row["arm"],
            str(row["bytes"]),
            f"{row['parameters']:,}",
            f"{row['rate']:g}" + ("*" if row["at_the_edge"] else ""),
            f"{loss:.3f}",
            f"{math.exp(loss):.2f}",
            f"{mean(row['difference']):+.3f}",
            " ".join(f"{d:+.3f}" for d in row["difference"]),
        )
    console = Console(soft_wrap=True, width=max(110, Console().width))  # also into a file
    console.print(table)
    console.print("bytes: keys and values of one token, in 16 bits. to MQA: difference of losses")
    if any(row["at_the_edge"] for row in rows):
        console.print("* at the edge of the grid: the best may lie beyond")


def plot(
    settings: Settings, runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path
) -> None:
    """Loss against bytes per token, and against the learning rate of the grid."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), dpi=150, layout="constrained")
    for row in rows:
        arm, colour = row["arm"], COLOURS[row["arm"]]
        size = [row["bytes"]] * len(row["losses"])
        left.plot(size, row["losses"], "o", color=colour, alpha=0.35)
        left.plot(row["bytes"], mean(row["losses"]), "D", color=colour, markersize=9, label=arm)
        grid = {run["rate"]: run["loss"] for run in runs if run["arm"] == arm and not run["seed"]}
        rates = settings.learning_rates
        right.plot(rates, [grid[rate] for rate in rates], "o-", color=colour, label=arm)
    left.set_xscale("log", base=2)
    sizes = sorted({row["bytes"] for row in rows})
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.set_xlabel("bytes of keys and values per token (16 bit)")
    left.set_title(f"best learning rate, {len(settings.seeds)} seeds and their mean")
    right.set_xscale("log")
    right.set_xticks(settings.learning_rates, [f"{rate:g}" for rate in settings.learning_rates])
    right.minorticks_off()
    right.set_xlabel("peak learning rate")
    right.set_title("the grid, one seed")
    for axes in (left, right):
        axes.set_ylabel("validation loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy models, a few steps")
    parser.add_argument("--resume", action="store_true", help="keep runs already finished")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokens = prepare_tokens(settings, arguments.output)
    path = arguments.output / "runs.jsonl"
    runs = run(settings, Runs(settings, tokens, path, arguments.resume), arguments.workers)
    rows = summarise(settings, runs)
    result = {"settings": asdict(settings), "rows": rows}
    (arguments.output / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(settings, runs, rows, arguments.output / "compare.png")
    print_table(rows, settings)
    print(f"written: {arguments.output}/compare.json, compare.png")


if __name__ == "__main__":
    main()
