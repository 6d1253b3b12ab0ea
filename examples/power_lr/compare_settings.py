"""The comparison's model and budgets, and the schedules that compete."""

from __future__ import annotations

from dataclasses import dataclass

from torch_plugins.config import PowerLR as PowerLRConfig
from torch_plugins.power_lr import Schedule, cosine, wsd

ARMS = {"power": "a, eta_max", "published": "a, eta_max", "cosine": "peak", "WSD": "peak"}
"""Each arm, and what is tuned. ``published`` is Power with the paper's numbers as they are."""

PUBLISHED = (4, 0.02)
"""a and eta_max of arXiv 2408.13359, found for muP models of billions of tokens."""


@dataclass(frozen=True)
class Settings:
    """A small decoder, four cells (two horizons, two batch sizes), and a grid for each arm."""

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    vocab_size: int = 1024
    sequence_length: int = 128
    tokens: int = 65_536
    """The short horizon T, at which every arm is tuned."""
    batch_size: int = 4
    """The small batch B, in sequences, at which every arm is tuned."""
    longer: int = 16
    """The long horizon over T. From T on, Power's rate falls to a quarter of what it was there."""
    larger: int = 4
    """The large batch over B."""
    seeds: tuple[int, ...] = (1, 2)
    """Of initial weights and order of the data; every arm runs with each."""
    amplitudes: tuple[float, ...] = (4, 8, 16)
    """Power's a, each with each ``max_lrs``."""
    max_lrs: tuple[float, ...] = (0.006, 0.012)
    """Power's eta_max."""
    peaks: tuple[float, ...] = (0.003, 0.004, 0.006, 0.008, 0.012, 0.016)
    """Peak rate of the others: as many runs as for Power."""
    validation_sequences: int = 256
    documents: int | None = None
    """Keep about so many documents of the corpus; None keeps all."""

    @property
    def warmup_tokens(self) -> int:
        """The same in every cell: what Power's schedule may know."""
        return self.tokens // 10

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(tokens, batch size); the first is the one for tuning."""
        return [
            (self.tokens * longer, self.batch_size * larger)
            for longer in (1, self.longer)
            for larger in (1, self.larger)
        ]

    def grid(self, arm: str) -> list[tuple[float, ...]]:
        """What is tried in the cell for tuning."""
        if arm == "power":
            return [(a, max_lr) for max_lr in self.max_lrs for a in self.amplitudes]
        return [PUBLISHED] if arm == "published" else [(peak,) for peak in self.peaks]

    def label(self, cell: tuple[int, int]) -> str:
        """``4T, B``"""
        longer, larger = cell[0] // self.tokens, cell[1] // self.batch_size
        return f"{longer if longer > 1 else ''}T, {larger if larger > 1 else ''}B"


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    values: tuple[float, ...]
    """Power's a and eta_max, or the peak rate."""
    tokens: int
    batch_size: int
    seed: int

    def schedule(self, settings: Settings) -> Schedule:
        """All warm up over the same tokens and end at 0; Power and WSD decay over the last fifth.

        Power's b is the paper's.
        """
        warmup, decay = settings.warmup_tokens, self.tokens // 5
        if self.arm == "cosine":
            return cosine(*self.values, self.tokens, warmup_tokens=warmup)
        if self.arm == "WSD":
            return wsd(*self.values, self.tokens, decay, warmup_tokens=warmup)
        a, max_lr = self.values
        return Schedule(PowerLRConfig(a=a, decay_tokens=decay), max_lr, warmup, self.tokens)

    def __str__(self) -> str:
        return (
            f"{self.arm} {numbers(self.values)}, {self.tokens:,} tokens, batch {self.batch_size}, "
            f"seed {self.seed}"
        )


def numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


FULL = Settings()
QUICK = Settings(
    hidden_size=16,
    layers=1,
    heads=2,
    vocab_size=384,
    sequence_length=32,
    tokens=4096,
    batch_size=2,
    seeds=(1,),
    amplitudes=(4, 32),
    max_lrs=(0.016,),
    peaks=(0.002, 0.016),
    validation_sequences=32,
    longer=4,
    documents=40,
)
