"""The comparison's model and budgets, and the schedules that compete."""

from __future__ import annotations

from dataclasses import dataclass

from torch_plugins.config import PowerLR as PowerLRConfig
from torch_plugins.power_lr import Schedule, cosine, wsd

ARMS = {"power": "a", "cosine": "peak", "WSD": "peak"}
"""Each arm has one number to tune."""


@dataclass(frozen=True)
class Settings:
    """A small Llama, four cells (two horizons, two batch sizes), and one grid per arm."""

    hidden_size: int = 32
    layers: int = 2
    heads: int = 4
    vocab_size: int = 1024
    sequence_length: int = 128
    tokens: int = 262_144
    """The short horizon T, at which every arm is tuned."""
    batch_size: int = 4
    """The small batch B, in sequences, at which every arm is tuned."""
    factor: int = 4
    """From T to the long horizon, and from B to the large batch."""
    seeds: tuple[int, ...] = (1, 2)
    """Of initial weights and order of the data; every arm runs with each."""
    amplitudes: tuple[float, ...] = (4, 8, 16, 32, 64)
    """Grid of Power's a. The paper's 4 is among them."""
    peaks: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032)
    """Grid of the others' peak rate."""
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
            for longer in (1, self.factor)
            for larger in (1, self.factor)
        ]

    def grid(self, arm: str) -> tuple[float, ...]:
        return self.amplitudes if arm == "power" else self.peaks

    def label(self, cell: tuple[int, int]) -> str:
        """``4T, B``"""
        longer, larger = cell[0] // self.tokens, cell[1] // self.batch_size
        return f"{longer if longer > 1 else ''}T, {larger if larger > 1 else ''}B"


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    value: float
    """Power's a, or the peak rate."""
    tokens: int
    batch_size: int
    seed: int

    def schedule(self, settings: Settings) -> Schedule:
        """All warm up over the same tokens and end at 0; Power and WSD decay over the last fifth.

        Power has the paper's b and eta_max.
        """
        warmup, decay = settings.warmup_tokens, self.tokens // 5
        if self.arm == "cosine":
            return cosine(self.value, self.tokens, warmup_tokens=warmup)
        if self.arm == "WSD":
            return wsd(self.value, self.tokens, decay, warmup_tokens=warmup)
        power = PowerLRConfig(a=self.value, decay_tokens=decay)
        return Schedule(power, warmup_tokens=warmup, total_tokens=self.tokens)

    def __str__(self) -> str:
        return (
            f"{self.arm} {ARMS[self.arm]} {self.value:g}, {self.tokens:,} tokens, "
            f"batch {self.batch_size}, seed {self.seed}"
        )


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
    peaks=(0.002, 0.016),
    validation_sequences=32,
    documents=40,
)
