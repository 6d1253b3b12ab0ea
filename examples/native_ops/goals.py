"""What was aimed at, as data, and what a run says of it.

A goal compares one of our arms with the fastest of some peers in the same row. Most were set on a
processor with AMX; they are shown whatever the processor is, with the highest ratio that its own
limits leave: the peer's measured time over ours at the machine's limit, see ``limits.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arms import Row
from names import (
    ADD_NORM,
    BF16,
    COMPILED,
    FEATURES,
    FUSED,
    GGML,
    GROUPED,
    INT4_PACK,
    INT8,
    MOE_INT4,
    ORT,
    TORCHAO_INT4,
    TORCHAO_INT8,
)
from timing import ratio


@dataclass(frozen=True)
class Goal:
    operator: str
    arm: str
    against: tuple[str, ...]
    """Peers, the fastest of which counts."""
    at_least: float
    """Times faster."""
    states: tuple[str, ...] = ("warm",)
    tokens: tuple[int, ...] = ()
    """Empty: any."""
    words: str = ""

    def applies(self, row: Row) -> bool:
        return (
            row["operator"] == self.operator
            and row["state"] in self.states
            and (not self.tokens or row["tokens"] in self.tokens)
            and self.arm in row["arms"]
        )


INT8_PEERS = (*INT8, TORCHAO_INT8)
INT4_PEERS = (TORCHAO_INT4, ORT, GGML)
DECODE = ("warm", "cold")
FAKE_QUANT = "fake-quant + kurtosis"
FOUR_MB, SIXTY_FOUR_MB = 2**20 // FEATURES, 2**24 // FEATURES
MANY_ROWS = (32, 512)

GOALS = (
    Goal("linear", "W4A4", INT4_PEERS, 1.0, DECODE, (1,), "best int4 peer"),
    Goal("linear", "W4A4", (BF16,), 5.0, ("warm",), (1,), "bf16"),
    Goal(
        "linear",
        "W4A4",
        (*INT8_PEERS, *INT4_PEERS, INT4_PACK),
        2.0,
        DECODE,
        (8, 32),
        "best int8 or int4",
    ),
    Goal("linear", "W4A4", INT8, 1.5, ("warm",), (512,), "torch dynamic int8"),
    Goal("linear", "W4A4", (BF16,), 2.0, ("warm",), (512,), "bf16"),
    Goal("linear", "W4A4 g128", (BF16,), 1.1, ("warm",), (512,), "bf16"),
    Goal("sparse MoE", MOE_INT4, (GROUPED,), 4.0, ("warm",), (1, 8, 32), GROUPED),
    Goal("sparse MoE", MOE_INT4, (GROUPED,), 2.0, ("warm",), (512,), GROUPED),
    Goal(FAKE_QUANT, FUSED, (COMPILED,), 2.0, ("forward",), (FOUR_MB,), COMPILED),
    Goal(FAKE_QUANT, FUSED, (COMPILED,), 3.0, ("forward",), (SIXTY_FOUR_MB,), COMPILED),
    Goal(FAKE_QUANT, FUSED, (COMPILED,), 3.0, ("forward+backward",), (), COMPILED),
    Goal("add + RMSNorm", FUSED, (ADD_NORM,), 5.0, ("warm",), MANY_ROWS, ADD_NORM),
)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    row: Row
    peer: str
    """The fastest of those it is compared with."""
    ratio: tuple[float, float, float]
    """Median and quartiles of the rounds."""
    ceiling: float | None
    """The ratio at the machine's limit."""

    @property
    def reached(self) -> bool:
        return self.ratio[0] >= self.goal.at_least

    @property
    def word(self) -> str:
        if self.reached:
            return "reached"
        beyond = self.ceiling is not None and self.ceiling < self.goal.at_least
        return "not reached (beyond the limit)" if beyond else "not reached"

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        row = {key: self.row[key] for key in ("operator", "shape", "state", "tokens", "threads")}
        found = {"peer": self.peer, "ratio": self.ratio, "ceiling": self.ceiling}
        return {**row, **asdict(self.goal), **found, "reached": self.reached}


def best(row: Row, names: Sequence[str]) -> str | None:
    """The fastest of these arms, if any is there."""
    present = [name for name in names if name in row["arms"]]
    return min(present, key=lambda name: row["arms"][name]["median"], default=None)


def compare(row: Row, arm: str, base: str) -> tuple[float, float, float]:
    """Times that ``arm`` is faster than ``base``: median and quartiles of the rounds."""
    clock = row["clock"]
    return ratio(row["arms"][base][clock], row["arms"][arm][clock])


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Every goal in every row that it is about, where one of its peers was measured."""
    found = []
    for row in rows:
        for goal in GOALS:
            peer = best(row, goal.against) if goal.applies(row) else None
            if peer:
                floor = row["arms"][goal.arm]["floor"]
                ceiling = row["arms"][peer]["median"] / floor if floor else None
                found.append(Verdict(goal, row, peer, compare(row, goal.arm, peer), ceiling))
    return found
