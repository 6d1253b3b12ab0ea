"""How ``constants.FITTED`` came about: ``python -m torch_plugins.ladder_residual check --refit``.

Least squares of log errors over the tables of ``paper.FITTED_ON``: tokens/s of the standard model
and its ratio to the bound without communication, and of the contention alone, the ladder's time
from both as measured. Compass search over logarithms: deterministic, standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .constants import Constants, LinkConstants
from .paper import Cell
from .predict import from_data_sheet, from_measured

START = (0.5, 0.9, 10.0, 0.5, 5.0, 1.0, 0.5, 5.0, 1.0)
"""matmul, memory, module (us), then share, start (us) and step of NVLink and of PCIe."""

SHARES = (0, 1, 3, 6)
"""Those of them that cannot exceed 1."""


def micro(value: float) -> float:
    """Microseconds as seconds; two digits stay two digits."""
    return float(f"{value * 1e-6:.12g}")


def constants_of(values: Sequence[float], contention: float = 0.0) -> Constants:
    matmul, memory, module, *links = values
    nvlink, pcie = (LinkConstants(s, micro(t), f) for s, t, f in (links[:3], links[3:]))
    return Constants(matmul, memory, micro(module), contention, {"nvlink": nvlink, "pcie": pcie})


def fit(cells: Sequence[Cell]) -> Constants:
    """All constants, to two digits."""

    def error(logs: Sequence[float]) -> float:
        values = [math.exp(value) for value in logs]
        if any(values[index] > 1 for index in SHARES):
            return math.inf
        return timing_error(cells, constants_of(values))

    found = compass([math.log(value) for value in START], error)
    values = [float(f"{math.exp(value):.2g}") for value in found]
    return constants_of(values, fit_contention(cells))


def timing_error(cells: Sequence[Cell], constants: Constants) -> float:
    """Sum of squared log errors of tokens/s and of the bound's ratio."""
    total = 0.0
    for cell in cells:
        predicted = from_data_sheet(cell, constants)
        total += math.log(predicted.standard / cell.standard) ** 2
        total += math.log(predicted.bound * cell.standard / cell.bound) ** 2
    return total


def fit_contention(cells: Sequence[Cell]) -> float:
    """In hundredths: of the ladder's speedup from measured times."""

    def error(share: int) -> float:
        ratios = (from_measured(cell, share / 100) * cell.standard / cell.ladder for cell in cells)
        return sum(math.log(ratio) ** 2 for ratio in ratios)

    return min(range(101), key=error) / 100


def compass(
    start: Sequence[float],
    error: Callable[[Sequence[float]], float],
    step: float = 0.5,
    smallest: float = 0.005,
) -> list[float]:
    """A step in each direction while it helps; then half the step."""
    best, least = list(start), error(start)
    while step > smallest:
        improved = False
        for index in range(len(best)):
            for sign in (1, -1):
                tried = [v + sign * step * (i == index) for i, v in enumerate(best)]
                if (found := error(tried)) < least:
                    best, least, improved = tried, found, True
        step = step if improved else step / 2
    return best
