"""What the runs measured: kept in a file, and read as answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from compare_settings import ARMS, Run, Settings
from compare_training import Outcome


class Results:
    """Outcomes by run, saved after each of them.

    Args:
        path: the JSON file.
        identity: settings and data; a file with others is not read.
        resume: read the file that an earlier comparison left.
    """

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.outcomes: dict[Run, Outcome] = {}
        if resume and path.exists():
            saved = json.loads(path.read_text())
            if saved["identity"] == self.identity:
                for entry in saved["runs"]:
                    run = entry["run"] | {"values": tuple(entry["run"]["values"])}
                    self.outcomes[Run(**run)] = Outcome(**entry["outcome"])

    def add(self, run: Run, outcome: Outcome) -> None:
        self.outcomes[run] = outcome
        runs = [{"run": asdict(r), "outcome": asdict(o)} for r, o in self.outcomes.items()]
        text = json.dumps({"identity": self.identity, "runs": runs}, indent=1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)  # at once: an interrupted comparison can be resumed

    def losses(
        self, arm: str, values: tuple[float, ...], cell: tuple[int, int], settings: Settings
    ) -> list[float]:
        """One per seed."""
        return [self.outcomes[Run(arm, values, *cell, seed)].loss for seed in settings.seeds]

    def tuning(self, arm: str, settings: Settings) -> dict[tuple[float, ...], float]:
        """The grid's mean losses in the cell for tuning."""
        cell = settings.cells[0]
        grid = settings.grid(arm)
        return {values: fmean(self.losses(arm, values, cell, settings)) for values in grid}

    def best(self, arm: str, settings: Settings) -> tuple[float, ...]:
        """What is carried over."""
        losses = self.tuning(arm, settings)
        return min(losses, key=losses.__getitem__)

    def table(self, settings: Settings) -> dict[str, list[list[float]]]:
        """Of every arm with its best values, the losses per cell and seed."""
        best = {arm: self.best(arm, settings) for arm in ARMS}
        return {
            arm: [self.losses(arm, values, cell, settings) for cell in settings.cells]
            for arm, values in best.items()
        }

    def at_the_edge(self, settings: Settings) -> list[str]:
        """Arms of which a tuned number is the first or last of three or more that were tried."""
        found = []
        for arm in ARMS:
            tried = [sorted(set(values)) for values in zip(*settings.grid(arm), strict=True)]
            chosen = zip(self.best(arm, settings), tried, strict=True)
            if any(len(all_) > 2 and value in (all_[0], all_[-1]) for value, all_ in chosen):
                found.append(arm)
        return found

    @property
    def seconds(self) -> float:
        """CPU time of all runs."""
        return sum(outcome.seconds for outcome in self.outcomes.values())
