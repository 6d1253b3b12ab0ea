"""Does one set of Power hyperparameters carry over to other horizons and batch sizes?

    make compare-power-lr             # or: python examples/power_lr/compare.py
    python examples/power_lr/compare.py --quick           # a toy, to see every step in seconds

A small Qwen3 on real text, in four cells: two horizons (T and 16T tokens) by two batch sizes (B and
4B). Power's ``a`` and ``eta_max``, cosine's peak and WSD's peak are tuned in the first cell, in as
many runs each, and carried over to the others as they are; a fourth arm is Power with the paper's
numbers. Trains on the CPU, one run per core at a time; prints tables, writes ``results.json`` and
``compare.png``. ``--resume`` keeps finished runs of the same settings.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch
from compare_plot import draw
from compare_results import Results
from compare_settings import ARMS, FULL, QUICK, Run, Settings, numbers
from compare_training import prepare_data, start_worker, train
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OUTPUT = Path(__file__).resolve().parents[2] / "out" / "power_lr"


def tuning_runs(settings: Settings) -> list[Run]:
    return [
        Run(arm, values, *settings.cells[0], seed)
        for seed in settings.seeds
        for arm in ARMS
        for values in settings.grid(arm)
    ]


def carried_over_runs(settings: Settings, results: Results) -> list[Run]:
    return [
        Run(arm, results.best(arm, settings), *cell, seed)
        for cell in settings.cells[1:]
        for seed in settings.seeds
        for arm in ARMS
    ]


def perform(
    title: str,
    runs: Iterable[Run],
    settings: Settings,
    results: Results,
    pool: ProcessPoolExecutor,
    console: Console,
) -> None:
    """Train what is not in ``results`` yet, the longest runs first."""
    runs = list(runs)
    todo = sorted((r for r in runs if r not in results.outcomes), key=lambda r: -r.tokens)
    kept = f", {len(runs) - len(todo)} kept from an earlier one" if len(todo) < len(runs) else ""
    console.print(f"[bold]{title}[/bold] {len(todo)} runs{kept}", highlight=False)
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} runs"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(todo))
        waiting = {
            pool.submit(train, run, settings, results.path.parent / "data"): run for run in todo
        }
        for future in as_completed(waiting):
            run, outcome = waiting[future], future.result()
            results.add(run, outcome)
            progress.advance(task)
            console.print(
                f"  {run}: {outcome.loss:.4f}  ({outcome.seconds:.0f} s)", highlight=False
            )


def grids(results: Results, settings: Settings) -> Table:
    table = Table(title=f"Tuning at {settings.label(settings.cells[0])}: mean validation loss")
    for column in ("arm", "numbers", "grid: loss"):
        table.add_column(column)
    for arm, names in ARMS.items():
        best, losses = results.best(arm, settings), results.tuning(arm, settings)
        cells = [
            f"[bold]{numbers(v)}: {loss:.3f}[/bold]" if v == best else f"{numbers(v)}: {loss:.3f}"
            for v, loss in losses.items()
        ]
        rows = ["   ".join(cells[i : i + 3]) for i in range(0, len(cells), 3)]
        table.add_row(arm, names, "\n".join(rows))
    return table


def summary(results: Results, settings: Settings) -> Table:
    """Losses of the tuned arms, and Power's differences to the others within a seed."""
    losses = results.table(settings)
    table = Table(title=f"Validation loss: mean of {len(settings.seeds)} seeds, ± half their range")
    table.add_column("arm")
    for cell in settings.cells:
        table.add_column(settings.label(cell), justify="right", no_wrap=True)

    def spread(values: list[float], form: str) -> str:
        return f"{fmean(values):{form}} ±{(max(values) - min(values)) / 2:.3f}"

    for arm, row in losses.items():
        name = f"{arm} {numbers(results.best(arm, settings))}"
        table.add_row(name, *(spread(seeds, ".3f") for seeds in row))
    table.add_section()
    for other in list(ARMS)[1:]:
        pairs = zip(losses["power"], losses[other], strict=True)
        differences = ([p - q for p, q in zip(a, b, strict=True)] for a, b in pairs)
        table.add_row(f"power - {other}", *(spread(d, "+.3f") for d in differences))
    return table


def compare(settings: Settings, output: Path, resume: bool, workers: int, console: Console) -> None:
    """The whole comparison."""
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare_data(settings, output / "data")
    identity = {**asdict(settings), "corpus": corpus["fingerprint"], "torch": torch.__version__}
    results = Results(output / "results.json", identity, resume)
    console.print(
        f"{corpus['train_tokens']:,} tokens of Python's standard library; T = {settings.tokens:,} "
        f"tokens, B = {settings.batch_size} sequences of {settings.sequence_length}",
        highlight=False,
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker) as pool:
        try:
            perform("tuning", tuning_runs(settings), settings, results, pool, console)
            runs = carried_over_runs(settings, results)
            perform("carrying over", runs, settings, results, pool, console)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    draw(results, settings, output / "compare.png")
    console.print(grids(results, settings))
    console.print(summary(results, settings))
    for arm in results.at_the_edge(settings):
        console.print(f"{arm}: its best value ends its grid; a wider one may have a better")
    console.print(
        f"written: {output}/results.json, compare.png; {results.seconds:.0f} seconds of CPU time "
        f"in the runs, {time.monotonic() - started:.0f} seconds in all",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a toy model, a few steps")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {FULL.seeds}")
    parser.add_argument("--resume", action="store_true", help="keep runs already finished")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--workers", type=int, default=cores or 1, help="default: %(default)s")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if arguments.quick and output == OUTPUT:
        output = OUTPUT.with_name(OUTPUT.name + "_quick")
    settings = QUICK if arguments.quick else FULL
    if arguments.seeds:
        settings = replace(settings, seeds=tuple(arguments.seeds))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end too
    console = Console(soft_wrap=True)
    try:
        compare(settings, output, arguments.resume, arguments.workers, console)
    except RuntimeError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
