"""From times to ratios: table, goals and picture of the ladder benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from variants import (
    CONTROL,
    DESYNC,
    LADDER,
    LADDER_BOUND,
    PARALLEL,
    STANDARD,
    STANDARD_BOUND,
    WAITING,
    Shape,
)

GOALS = {
    "virtual link": {
        ("forward", 0.5): 0.74,
        ("forward", 1.0): 0.62,
        ("step", 0.5): 0.80,
        ("step", 1.0): 0.72,
        ("step", 2.0): 0.75,
        ("sp forward", 1.0): 0.72,
    },
    "real link": {("forward", 1.0): 0.70},
}
"""Time over the best standard model's, by link; elsewhere no more than ``NEVER``."""
NEVER = 1.01
CONTROL_BAND = (0.95, 1.05)
SET_BY = {"step": "forward", "sp step": "sp forward"}
"""The phase whose compute a link was set by, where it is another."""


def exposed(ratio: float, phase: str, record: Any) -> float:
    """Milliseconds that a ladder exposes which hides all that can be: under module i, of compute
    a_i, it hides the communication c of the module before, and the last one under nothing:

        sum over i > 1 of max(0, c - a_i),  + c

    and likewise backward. Sequence parallelism gathers a module's input again in the backward.
    """
    forward, modules = SET_BY.get(phase, phase), record["modules"]
    of = modules["decode" if phase == "decode" else "forward"]
    c = ratio * record["bounds"][STANDARD_BOUND.name][forward] / len(of)
    total = sum(max(0.0, c - compute) for compute in of[1:]) + c
    if phase != forward:
        c *= 1.5 if phase.startswith("sp") else 1
        total += sum(max(0.0, c - compute) for compute in modules["backward"][:-1]) + c
    return total


def summarise(records: list[Any], where: str) -> list[dict[str, Any]]:
    """One row per phase and link: medians over the repetitions, of quotients taken within one.

    ``ladder`` is the time over the best standard model's. ``control`` is the ladder that waits at
    once over the standard model that does. ``exposed`` is what communication costs the ladder, and
    ``hidden`` = (control - ladder) / (control - ladder without communication): of what waiting at
    once costs, the share that is saved.
    """
    rows = []
    for phase in records[0]["bounds"][STANDARD_BOUND.name]:
        of = SET_BY.get(phase, phase)
        for ratio in records[0]["links"][of]:
            each = [_times(record, phase, of, ratio) for record in records]
            goal = GOALS[where].get((phase, float(ratio)), NEVER)
            rows.append(_row(phase, float(ratio), each, goal))
    return rows


def _times(record: Any, phase: str, of: str, ratio: str) -> dict[str, float]:
    times = {name: found[phase] for name, found in record["links"][of][ratio].items()}
    bounds = {name: found[phase] for name, found in record["bounds"].items()}
    least = bounds[LADDER_BOUND.name] + exposed(float(ratio), phase, record)
    return times | bounds | {"ideal": least}


def _row(phase: str, ratio: float, each: list[dict[str, float]], goal: float) -> dict[str, Any]:
    def mid(value: Callable[[dict[str, float]], float]) -> float:
        return median(map(value, each))

    def over(name: str, other: str) -> float | None:
        return mid(lambda t: t[name] / t[other]) if name in each[0] and other in each[0] else None

    against = {name: over(LADDER.name, name) for name in (STANDARD.name, WAITING.name)}
    best = max(against, key=lambda name: against[name] or 0)
    lost = [t[CONTROL.name] - t[LADDER_BOUND.name] for t in each]
    saved = [t[CONTROL.name] - t[LADDER.name] for t in each]
    return {
        "phase": phase,
        "ratio": ratio,
        "standard_ms": mid(lambda t: t[best]),
        "ladder_ms": mid(lambda t: t[LADDER.name]),
        "ladder": against[best],
        "ideal": over("ideal", best),
        "goal": goal,
        "met": (against[best] or 0) <= goal,
        "parallel": over(PARALLEL.name, best),
        "desync": over(DESYNC.name, best),
        "no_communication": over(STANDARD_BOUND.name, best),
        "control": over(CONTROL.name, WAITING.name),
        "exposed_ms": mid(lambda t: t[LADDER.name] - t[LADDER_BOUND.name]),
        "hidden": median(s / c for s, c in zip(saved, lost, strict=True)),
    }


def print_table(rows: list[dict[str, Any]], shape: Shape, ranks: int, where: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"TP={ranks}, {shape.layers} layers of {shape.hidden_size}, "
        f"{shape.message_bytes / 2**20:.2f} MiB per all-reduce, {where}"
    )
    columns = ("phase", "link", "standard\nms", "ladder\nms", "ladder", "ideal", "goal")
    for column in (*columns, "parallel", "desync", "no\ncomm.", "control", "exposed\nms", "hidden"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        off = not CONTROL_BAND[0] <= row["control"] <= CONTROL_BAND[1]
        table.add_row(
            row["phase"],
            f"{row['ratio']:g}" if row["ratio"] else "as is",
            f"{row['standard_ms']:.1f}",
            f"{row['ladder_ms']:.1f}",
            f"{row['ladder']:.2f}",
            f"{row['ideal']:.2f}" if row["ratio"] else "",
            f"{row['goal']:.2f}" + ("" if row["met"] else " missed"),
            f"{row['parallel']:.2f}" if row["parallel"] else "",
            f"{row['desync']:.2f}",
            f"{row['no_communication']:.2f}",
            f"{row['control']:.2f}" + ("!" if off else ""),
            f"{row['exposed_ms']:.1f}",
            f"{row['hidden']:.0%}",
        )
    console = Console(width=132)
    console.print(table)
    console.print(
        "link: time of an all-reduce over compute of a module in the forward. ladder, its ideal,\n"
        "parallel (attention and MLP in one), desync (one all-reduce for two layers) and no\n"
        "comm.: time over the best standard model's.\n"
        "control: ladder over standard, both waiting at once; beyond 0.95 to 1.05 (!) the\n"
        "measurement was disturbed. exposed: what communication costs the ladder. hidden: of what\n"
        "waiting at once costs it, the share that it saves."
    )


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time over the best standard model's against the speed of the link, a panel for each phase."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    phases = list(dict.fromkeys(row["phase"] for row in rows))
    wide = min(3, len(phases))
    high = -(-len(phases) // wide)
    figure, panels = plt.subplots(
        high,
        wide,
        figsize=(4 * wide, 3.2 * high + 0.8),
        dpi=150,
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    lines = (
        ("ladder", "o-", "#DD8452", "ladder"),
        ("ideal", "--", "#DD8452", "ladder that hides all it can"),
        ("parallel", "s-", "#55A868", "parallel attention and MLP"),
        ("desync", "^-", "#8172B3", "desync 4x"),
        ("no_communication", ":", "#4C72B0", "standard, no communication"),
    )
    for axes, phase in zip(panels.flat, phases, strict=False):
        found = [row for row in rows if row["phase"] == phase and row["ratio"]]
        for key, style, colour, label in lines:
            if found and found[0][key] is not None:
                x, y = [row["ratio"] for row in found], [row[key] for row in found]
                axes.plot(x, y, style, color=colour, label=label, markersize=4)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        ticks = [row["ratio"] for row in found]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title({"step": "forward and backward"}.get(phase, phase), fontsize=10)
        axes.set_xlabel("time of an all-reduce / compute of a module", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in list(panels.flat)[len(phases) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.supylabel("time / best standard model", fontsize=9)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)
