"""Loss against active parameters: dense twin, Megatron's sparse mixture, DS-MoE, on real text.

    python examples/dense_moe/compare.py            # a quarter of an hour on two cores
    python examples/dense_moe/compare.py --quick    # a toy, to see every step

Models of equal total parameters, trained by Megatron on the same batches; and one dense model of
the active parameters. Each arm gets the best learning rate of its grid (DS-MoE also its weight of
the MI loss), by the loss at the share of experts that the sparse mixture computes; then fresh
seeds, on which K and the threshold are swept. Prints tables; writes ``compare.json``,
``compare.png``, and the checkpoint of one DS-MoE run. ``--resume`` keeps the runs that an
interrupted call has finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arms import ARMS, QUICK, STOCK, WEIGHTED, WITH_EXPERTS, Rule, Run, Settings, prepare_data
from results import at, draw, print_tables, summarise

OUTPUT = Path(__file__).resolve().parents[2] / "out" / "dense_moe"
OURS, HEADS = WEIGHTED


def start() -> None:
    """Get a worker ready; only workers import Megatron."""
    from training import start_worker

    start_worker()


def work(*arguments: Any) -> dict[str, Any]:
    from training import train

    return train(*arguments)


def rules_of(settings: Settings, run: Run) -> list[Rule]:
    """What is measured: little for the grid, everything for fresh seeds."""
    if run.arm not in (*WITH_EXPERTS, STOCK):
        return [("dense", 1)]
    if run.seed == 0:
        return [("top-k", settings.kept)]
    top_k: list[Rule] = [("top-k", k) for k in range(1, settings.experts + 1)]
    if run.arm == STOCK:
        return top_k
    return [*top_k, *(("threshold", threshold) for threshold in settings.thresholds)]


class Runs:
    """Trainings, several at once, each written down when it ends.

    Args:
        folder: of ``data``, ``runs.jsonl`` and ``checkpoint``.
        resume: start from the runs that are there already, if their settings are these; the grid
            and the seeds may be others.
    """

    def __init__(self, settings: Settings, folder: Path, resume: bool) -> None:
        self.settings, self.folder, self.path = settings, folder, folder / "runs.jsonl"
        fields = asdict(settings).items()
        self.identity = {k: v for k, v in fields if k not in ("rates", "weights", "seeds")}
        old = self.path.read_text().splitlines() if resume and self.path.exists() else []
        kept = [line for line in map(json.loads, old) if line["settings"] == self.identity]
        self.done = {Run(**line["run"]): line["found"] for line in kept}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def of(self, runs: Iterable[Run], pool: Executor) -> None:
        """Train those of ``runs`` that are missing."""
        missing = [run for run in runs if run not in self.done]
        futures = {pool.submit(work, *self._arguments(run)): run for run in missing}
        for future in as_completed(futures):
            run, found = futures[future], future.result()
            self.done[run] = found
            line = {"run": asdict(run), "found": found, "settings": self.identity}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            loss = at(found, self.settings)["loss"]
            print(f"{run}: {loss:.4f}  ({found['seconds']:.0f} s)", flush=True)

    def _arguments(self, run: Run) -> tuple[Any, ...]:
        saved = run.arm == OURS and run.seed == self.settings.seeds[0]
        save = self.folder / "checkpoint" if saved else None
        return self.settings, run, self.folder / "data", rules_of(self.settings, run), save

    def best(self, arm: str) -> Run:
        """Of the grid, by the loss at ``settings.kept`` experts."""
        grid = [run for run in self.done if run.arm == arm and run.seed == 0]
        return min(grid, key=lambda run: at(self.done[run], self.settings)["loss"])


def perform(settings: Settings, runs: Runs, workers: int) -> dict[str, Run]:
    """The grid with seed 0, then every arm's best with fresh seeds; returns the best.

    The arm with attention experts takes over what is found for the one without.
    """
    first, *others = settings.weights
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start) as pool:
        tuned = [arm for arm in ARMS if arm != HEADS]
        weight = {arm: first if arm in WEIGHTED else 0.0 for arm in ARMS}
        runs.of((Run(arm, rate, weight[arm], 0) for rate in settings.rates for arm in tuned), pool)
        runs.of((Run(OURS, runs.best(OURS).rate, other, 0) for other in others), pool)
        best = {arm: runs.best(OURS if arm == HEADS else arm) for arm in ARMS}
        chosen = {arm: (run.rate, run.weight) for arm, run in best.items()}
        runs.of((Run(arm, *chosen[arm], seed) for arm in ARMS for seed in settings.seeds), pool)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy models, a few steps")
    parser.add_argument("--resume", action="store_true", help="keep runs already finished")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    settings, output = (QUICK if arguments.quick else Settings()), arguments.output.resolve()
    if arguments.quick and output == OUTPUT:
        output = OUTPUT.with_name(OUTPUT.name + "_quick")
    output.mkdir(parents=True, exist_ok=True)
    prepare_data(settings, output / "data")
    runs = Runs(settings, output, arguments.resume)
    best = perform(settings, runs, arguments.workers)
    rows = summarise(settings, runs.done, best)
    told = [{"run": asdict(run), **found} for run, found in runs.done.items()]
    result = {"settings": asdict(settings), "rows": rows, "runs": told}
    (output / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(settings, rows, output / "compare.png")
    print_tables(settings, rows)
    print(f"written: {output}/compare.json, compare.png, checkpoint")


if __name__ == "__main__":
    main()
