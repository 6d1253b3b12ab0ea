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
                    self.outcomes[Run(**entry["run"])] = Outcome(**entry["outcome"])

    def add(self, run: Run, outcome: Outcome) -> None:
        self.outcomes[run] = outcome
        runs = [{"run": asdict(r), "outcome": asdict(o)} for r, o in self.outcomes.items()]
        text = json.dumps({"identity": self.identity, "runs": runs}, indent=1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)  # at once: an interrupted comparison can be resumed

    def losses(
        self, arm: str, value: float, cell: tuple[int, int], settings: Settings
    ) -> list[float]:
        """One per seed."""
        return [self.outcomes[Run(arm, value, *cell, seed)].loss for seed in settings.seeds]

    def best(self, arm: str, settings: Settings) -> float:
        """The grid value with the least mean loss in the cell for tuning."""
        cell = settings.cells[0]
        return min(
            settings.grid(arm), key=lambda value: fmean(self.losses(arm, value, cell, settings))
        )

    def table(self, settings: Settings) -> dict[str, list[list[float]]]:
        """Of every arm with its best value, the losses per cell and seed."""
        return {
            arm: [
                self.losses(arm, self.best(arm, settings), cell, settings)
                for cell in settings.cells
            ]
            for arm in ARMS
        }

    def at_the_edge(self, settings: Settings) -> list[str]:
        """Arms whose best value is the first or last of their grid: perhaps not the best."""
        grids = {arm: settings.grid(arm) for arm in ARMS}
        return [a for a, grid in grids.items() if self.best(a, settings) in (grid[0], grid[-1])]

    @property
    def seconds(self) -> float:
        """CPU time of all runs."""
        return sum(outcome.seconds for outcome in self.outcomes.values())
