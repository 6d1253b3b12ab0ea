"""Tables of ``estimate`` and ``check``, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..power_lr_cli import show
from .check import FORMS, QUANTITIES, Score
from .estimate import VARIANTS, Estimate
from .paper import CELLS

WIDTH = 150
SHORT = {
    "measured times": "times",
    "measured times, no contention": "times, ov 0",
    "data sheet, fitted": "fitted",
    "data sheet alone": "sheet",
}
"""Of the forms, as heads of columns."""


def estimate_rows(found: Sequence[Estimate]) -> list[dict[str, Any]]:
    """A dictionary a batch; seconds, tokens/s, speedups, and shares of time."""
    return [
        {
            "batch": one.work.batch,
            "all_reduce_s": {"prefill": one.prefill.reduce, "token": one.decode.reduce},
            "variants": {
                name: {
                    "prefill_s": one.prefill.times[name],
                    "token_s": one.decode.times[name],
                    "tokens_per_s": one.tokens_per_second(name),
                    "speedup": one.speedup(name),
                    "exposed": one.exposed(name),
                }
                for name in VARIANTS
            },
        }
        for one in found
    ]


def print_estimate(title: str, found: Sequence[Estimate], keep: int) -> None:
    """A row a batch and variant."""
    header = ["batch", "", "prefill ms", "token ms", "tokens/s", "speedup", "exposed comm"]
    rows = [
        [
            str(one.work.batch) if name == "standard" else "",
            f"desync {keep}x" if name == "desync" else name,
            f"{1e3 * one.prefill.times[name]:.2f}",
            f"{1e3 * one.decode.times[name]:.3f}",
            f"{one.tokens_per_second(name):.1f}",
            f"{one.speedup(name):.3f}",
            f"{100 * one.exposed(name):.1f} %",
        ]
        for one in found
        for name in VARIANTS
    ]
    show(title, header, rows, last_apart=False, width=WIDTH)


def print_cells() -> None:
    """A row a configuration: what was measured, and what each form says."""
    header = ["table", "TP", "batch"]
    for quantity, forms in FORMS.items():
        header += [quantity, *(SHORT[form] for form in forms)]
    rows = []
    for cell in CELLS:
        row = [cell.table, str(cell.tp), str(cell.batch)]
        for quantity, forms in FORMS.items():
            row.append(f"{QUANTITIES[quantity](cell):.3f}")
            row += [f"{predict(cell):.3f}" for predict in forms.values()]
        rows.append(row)
    title = (
        "Speedup over the standard model, of a ladder and without communication: measured, and "
        "predicted from measured times, from fitted constants, from data sheets alone"
    )
    show(title, header, rows, last_apart=False, width=WIDTH)


def print_scores(found: Sequence[Score]) -> None:
    header = ["speedup of", "tables", "form", "error", "error of the gain", "rank correlation"]
    rows = [
        [
            score.quantity,
            score.tables,
            score.form,
            f"{100 * score.ratio:.1f} %",
            f"{100 * score.gain:.0f} %",
            "" if score.rank is None else f"{score.rank:.2f}",
        ]
        for score in found
    ]
    show("Mean errors", header, rows, last_apart=False, width=WIDTH)


def check_json(found: Sequence[Score], claims: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    cells = [
        {
            "table": cell.table,
            "tp": cell.tp,
            "nodes": cell.nodes,
            "batch": cell.batch,
            "measured": {name: truth(cell) for name, truth in QUANTITIES.items()},
            "predicted": {
                name: {form: predict(cell) for form, predict in forms.items()}
                for name, forms in FORMS.items()
            },
        }
        for cell in CELLS
    ]
    return {"cells": cells, "scores": [asdict(score) for score in found], "claims": dict(claims)}
