"""A cell of the paper, predicted: from data sheets, and from two of its own measurements."""

from __future__ import annotations

from dataclasses import dataclass

from . import schedule
from .constants import Constants
from .estimate import Work, cluster, estimate
from .hardware import GPUS
from .paper import Cell
from .roofline import PAPER


@dataclass(frozen=True)
class Predicted:
    """``standard`` in tokens/s, the others relative to it."""

    standard: float
    ladder: float
    parallel: float
    bound: float


def from_data_sheet(cell: Cell, constants: Constants) -> Predicted:
    """Nothing of the cell's own measurements enters."""
    machine = cluster(GPUS["h100"], cell.tp, cell.link, cell.nodes)
    found = estimate(cell.shape, machine, Work(cell.batch, engine=PAPER), constants)
    speedups = (found.speedup(name) for name in ("ladder", "parallel", "no communication"))
    return Predicted(found.tokens_per_second("standard"), *speedups)


def from_measured(cell: Cell, contention: float) -> float:
    """The ladder's speedup from the cell's standard time and that without communication."""
    standard, bound = 1 / cell.standard, 1 / cell.bound
    return standard / schedule.from_measured(
        standard, bound, contention, modules=2 * cell.shape.layers
    )
