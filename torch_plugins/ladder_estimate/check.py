"""How far the estimates are from what the paper's authors measured, beside trivial baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation

from .constants import DATA_SHEET, FITTED
from .paper import CELLS, FITTED_ON, Cell
from .predict import from_data_sheet, from_measured

QUANTITIES = {
    "ladder": lambda cell: cell.ladder / cell.standard,
    "no communication": lambda cell: cell.bound / cell.standard,
}
"""Speedups over the standard model."""

FORMS: dict[str, dict[str, Callable[[Cell], float]]] = {
    "ladder": {
        "measured times": lambda cell: from_measured(cell, FITTED.contention),
        "measured times, no contention": lambda cell: from_measured(cell, 0.0),
        "data sheet, fitted": lambda cell: from_data_sheet(cell, FITTED).ladder,
        "data sheet alone": lambda cell: from_data_sheet(cell, DATA_SHEET).ladder,
    },
    "no communication": {
        "data sheet, fitted": lambda cell: from_data_sheet(cell, FITTED).bound,
        "data sheet alone": lambda cell: from_data_sheet(cell, DATA_SHEET).bound,
    },
}
"""What predicts each of them. "Measured times" knows the cell's standard time and its bound."""

CONSTANT, HINDSIGHT = "a constant", "the best constant, in hindsight"


@dataclass(frozen=True)
class Score:
    """Errors of one form on one set of cells; all but the rank correlation are better when low."""

    quantity: str
    tables: str
    form: str
    ratio: float
    """Mean of ``|predicted / measured - 1|``."""
    gain: float
    """The same of the speedup less 1."""
    rank: float | None
    """Spearman's correlation; None of constants, which order nothing."""


def groups() -> dict[str, list[Cell]]:
    """The tables that constants were fitted on, the others together, and each of these."""
    held = [cell for cell in CELLS if cell.table not in FITTED_ON]
    found = {
        "70B (fitted on)": [cell for cell in CELLS if cell.table in FITTED_ON],
        "held out": held,
    }
    for cell in held:
        found.setdefault(f"held out: {cell.table}", []).append(cell)
    return found


def scores() -> list[Score]:
    """Every form on every group, and the baselines."""
    found = []
    for quantity, truth in QUANTITIES.items():
        fitted = [truth(cell) for cell in CELLS if cell.table in FITTED_ON]
        for tables, cells in groups().items():
            true = [truth(cell) for cell in cells]
            for form, predict in FORMS[quantity].items():
                predicted = [predict(cell) for cell in cells]
                rank = spearman(predicted, true)
                errors = ratio_error(predicted, true), gain_error(predicted, true)
                found.append(Score(quantity, tables, form, *errors, rank))
            errors = constant_errors(true, [sum(fitted) / len(fitted)])
            found.append(Score(quantity, tables, CONSTANT, *errors, None))
            found.append(Score(quantity, tables, HINDSIGHT, *constant_errors(true, true), None))
    return found


def constant_errors(true: Sequence[float], candidates: Sequence[float]) -> tuple[float, float]:
    """Least errors of predicting one number for all: both are piecewise linear in it, so the best
    number of all is one of the true ones."""
    return (
        min(ratio_error([value] * len(true), true) for value in candidates),
        min(gain_error([value] * len(true), true) for value in candidates),
    )


def ratio_error(predicted: Sequence[float], true: Sequence[float]) -> float:
    return sum(abs(p / t - 1) for p, t in zip(predicted, true, strict=True)) / len(true)


def gain_error(predicted: Sequence[float], true: Sequence[float]) -> float:
    return ratio_error([p - 1 for p in predicted], [t - 1 for t in true])


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of ranks; 0 where all values of one side are equal."""
    try:
        return correlation(_ranks(left), _ranks(right))
    except StatisticsError:
        return 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Equal values share their mean rank: how many are less, and half of the other equal ones."""
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


def verdicts(found: Sequence[Score]) -> list[tuple[str, bool]]:
    """Sentences, and whether they are true, on held-out tables. A form beats a constant where both
    the error and that of the gain are less; the constant is the best of all for these very cells.
    """
    by = {(score.quantity, score.tables, score.form): score for score in found}
    error = by["ladder", "held out", "measured times"].ratio
    claims = [("measured times: ladder's speedup within 6 %", error <= 0.06)]
    held = [name for name in groups() if name.startswith("held out")]
    for form in ("data sheet, fitted", "data sheet alone"):
        for tables in held:
            for quantity in QUANTITIES:
                ours, constant = (by[quantity, tables, name] for name in (form, HINDSIGHT))
                better = ours.gain < constant.gain and ours.ratio < constant.ratio
                claims.append((f"{tables}, {form}: {quantity} beats any constant", better))
    return claims


def tokens_per_second_errors() -> dict[str, float]:
    """Of the standard model, ``data sheet, fitted``; 405B was published as ratios alone."""
    found: dict[str, list[float]] = {}
    for cell in CELLS:
        if cell.standard != 1:
            error = abs(from_data_sheet(cell, FITTED).standard / cell.standard - 1)
            found.setdefault(cell.table, []).append(error)
    return {table: sum(errors) / len(errors) for table, errors in found.items()}
