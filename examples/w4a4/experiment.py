"""Four-bit weights and activations after training: which regularisation makes them cheap?

    python examples/w4a4/experiment.py            # twenty minutes on one core
    python examples/w4a4/experiment.py --quick    # a toy, to see every step

The experiment of arXiv 2404.03605 with its control arms: a baseline; learned clips of the linear
layers' inputs alone; a penalty on the kurtosis of their outputs alone; both. All see the same
batches, and then are quantized in the same ways. It is done twice: with outliers planted in the
model's residual stream, and as usual. The weight of the kurtosis is chosen with seed 0, the largest
that costs little; the tables have other seeds. Prints them; writes ``experiment.json``,
``outliers.png``, ``perplexity.png``, and a model with clips as a Hugging Face folder. ``--resume``
keeps the runs that an interrupted call has finished.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from experiment_arms import ARMS, PLANTED, QUICK, Run, Settings, prepare_tokens, weighted
from experiment_plot import draw_outliers, draw_perplexities
from experiment_results import CHOICE, print_tables, summarise
from experiment_training import train
from torch import Tensor

BESIDE = ("weights", "tolerance", "seeds")
"""Settings that say which runs there are, and not what a run is."""
OUTPUT = Path(__file__).resolve().parents[2] / "out" / "w4a4"


def tell(line: str) -> None:
    print(line, flush=True)


class Runs:
    """Trainings, each written down when it ends.

    Args:
        folder: of ``runs.jsonl``, ``tokenizer`` and ``model``.
        resume: start from the runs that are there already, if their settings are these, those of
            ``BESIDE`` excepted.
    """

    def __init__(
        self, settings: Settings, data: dict[str, Tensor], folder: Path, resume: bool
    ) -> None:
        self.settings, self.data, self.path = settings, data, folder / "runs.jsonl"
        fields = json.loads(json.dumps(asdict(settings))).items()
        self.identity = {k: v for k, v in fields if k not in BESIDE}
        old = self.path.read_text().splitlines() if resume and self.path.exists() else []
        kept = [line for line in map(json.loads, old) if line["settings"] == self.identity]
        self.done = {Run(**line["run"]): line["found"] for line in kept}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def of(self, runs: list[Run]) -> None:
        """Train those of ``runs`` that are missing."""
        missing = [run for run in runs if run not in self.done]
        for number, run in enumerate(missing):
            tell(f"run {number + 1} of {len(missing)}: {run}")
            found = train(self.settings, run, self.data, tell, self._folder(run))
            self.done[run] = found
            line = {"run": asdict(run), "found": found, "settings": self.identity}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            tell(f"{run}: {CHOICE} {found['perplexities'][CHOICE]:.2f}, {found['seconds']:.0f} s")

    def _folder(self, run: Run) -> Path | None:
        """Where the model is saved: of the method, with the first seed, the last variant."""
        variant, seeds = self.settings.seeds[-1]
        kept = Run(variant, "both", run.weight, seeds[0])
        if run != kept:
            return None
        folder = self.path.with_name("model")
        shutil.copytree(self.path.with_name("tokenizer"), folder, dirs_exist_ok=True)
        return folder


def perform(settings: Settings, runs: Runs) -> float:
    """The weights of the kurtosis with seed 0, then every arm with the other seeds.

    Returns:
        The weight that is chosen: the largest that costs little, for outliers do not show in the
        perplexity of one way to quantize.
    """
    tried = [Run(PLANTED, "both", weight, 0) for weight in settings.weights]
    if len(tried) > 1:
        runs.of(tried)
    weight = chosen({run.weight: runs.done[run] for run in tried if run in runs.done}, settings)
    runs.of(counted(settings, weight))
    return weight


def chosen(found: dict[float, dict[str, Any]], settings: Settings) -> float:
    """The largest weight whose perplexity is within ``settings.tolerance`` of the best one's."""
    if not found:
        return settings.weights[0]
    losses = {weight: run["perplexities"][CHOICE] for weight, run in found.items()}
    most = min(losses.values()) * (1 + settings.tolerance)
    return max(weight for weight, loss in losses.items() if loss <= most)


def counted(settings: Settings, weight: float) -> list[Run]:
    """The runs of the tables."""
    return [
        Run(variant, arm, weight if weighted(arm) else 0.0, seed)
        for variant, seeds in settings.seeds
        for seed in seeds
        for arm in ARMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy models, a few steps")
    parser.add_argument("--weight", type=float, help="of the kurtosis; default: found with seed 0")
    parser.add_argument("--resume", action="store_true", help="keep runs already finished")
    arguments = parser.parse_args()
    settings, output = (QUICK if arguments.quick else Settings()), arguments.output.resolve()
    if arguments.quick and output == OUTPUT:
        output = OUTPUT.with_name(OUTPUT.name + "_quick")
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs = Runs(settings, prepare_tokens(settings, output), output, arguments.resume)
    if arguments.weight is not None:
        settings = replace(settings, weights=(arguments.weight,))
    weight = perform(settings, runs)
    rows = summarise(settings, {run: runs.done[run] for run in counted(settings, weight)})
    told: list[dict[str, Any]] = [{"run": asdict(r), **found} for r, found in runs.done.items()]
    result = {"settings": asdict(settings), "weight": weight, "rows": rows, "runs": told}
    (output / "experiment.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_outliers(settings, rows, output / "outliers.png")
    draw_perplexities(settings, rows, output / "perplexity.png")
    print_tables(settings, rows, runs.done)
    print(f"written: {output}/experiment.json, outliers.png, perplexity.png, model")


if __name__ == "__main__":
    main()
