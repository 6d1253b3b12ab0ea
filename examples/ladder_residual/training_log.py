"""What Megatron's training loop prints, as numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

_TRAIN = re.compile(
    r"iteration\s+(?P<iteration>\d+)/\s*\d+ \|.*"
    r"elapsed time per iteration \(ms\): (?P<step_ms>[\d.]+) \|.*"
    r"lm loss: (?P<loss>[-+\w.]+) \|"
)
_VALID = re.compile(
    r"validation loss at iteration (?P<iteration>\d+)\b.*lm loss value: (?P<loss>[-+\w.]+) \|"
)


@dataclass
class History:
    """One training run. Losses are in nats per token; a training loss is the mean of the
    iterations since the point before it, the first point that of iteration 1."""

    tokens_per_iteration: int
    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    valid_iterations: list[int] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)

    def read(self, line: str) -> bool:
        """Take the numbers of one line of the log; False when there are none in it."""
        if found := _TRAIN.search(line):
            self.iterations.append(int(found["iteration"]))
            self.losses.append(float(found["loss"]))
            self.step_ms.append(float(found["step_ms"]))
        elif found := _VALID.search(line):
            self.valid_iterations.append(int(found["iteration"]))
            self.valid_losses.append(float(found["loss"]))
        return found is not None

    def tokens(self, iterations: list[int]) -> list[int]:
        return [iteration * self.tokens_per_iteration for iteration in iterations]

    def smoothed(self, weight: float = 0.6) -> list[float]:
        """Exponential moving average of the training losses, corrected for its start."""
        mean, norm, result = 0.0, 0.0, []
        for loss in self.losses:
            mean = weight * mean + (1 - weight) * loss
            norm = weight * norm + (1 - weight)
            result.append(mean / norm)
        return result

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last tenth of the run."""
        return fmean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def median_step_ms(self) -> float:
        return median(self.step_ms)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_iteration / self.median_step_ms * 1000

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> History:
        return cls(**json.loads(path.read_text()))
