"""What a run says at its end: every arm's times, and the goals."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from arms import Row
from goals import Verdict, best, compare, verdicts
from limits import Limits
from names import BASES, OURS
from progress import count_words, limit_words, main_arm, milliseconds, peers, share, title
from rich import box
from rich.console import Console, Group
from rich.table import Table

WIDTH = 150
BUSY = 0.5
CAREFUL = "The machine had a load of {:.1f}: wall times, and their ratios, are worth little."
NOT_THERE = {"left_out": "not measured", "wrong": "WRONG, and not measured"}
LEGEND = """\
x: times faster, the median of quotients within a round; in brackets the middle half of them, and
the most that the limits of this machine leave. limit: time at that limit over the time it took.
error: of the output, to that of fp32 (linear) or of the peer in the first line without one of ours.
"""


def show(result: dict[str, Any]) -> None:
    """Everything that was measured, then the goals."""
    console = Console(soft_wrap=True)
    console = Console(width=max(console.width, WIDTH))
    machine, runs = result["machine"], result["runs"]
    sizes = ", ".join(f"{name} {size / 2**20:g} MiB" for name, size in machine["caches"].items())
    packages = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items())
    console.print(f"\n{machine['cpu']}, {machine['cores']} cores: {' '.join(machine['flags'])}")
    console.print(f"{sizes}\n{packages}", markup=False)
    for run in runs:
        limits = Limits(**run["limits"])
        console.print(
            f"{count_words(limits.threads)}: {limit_words(limits)}", markup=False, soft_wrap=True
        )
    if machine["load"] > BUSY:
        console.print(CAREFUL.format(machine["load"]), style="yellow", markup=False)
    for run in runs:
        for _, rows in groupby(run["rows"], lambda row: (row["operator"], title(row))):
            console.print(of_arms(list(rows)))
    for run in runs:
        for operator, rows in groupby(run["rows"], lambda row: row["operator"]):
            console.print(of_goals(operator, list(rows)))
    console.print(LEGEND, markup=False)
    for kind, style in (("left_out", "yellow"), ("wrong", "bold red")):
        for words in dict.fromkeys(words for run in runs for words in run[kind]):
            console.print(f"{NOT_THERE[kind]}: {words}", style=style, markup=False)


def of_arms(rows: list[Row]) -> Group:
    """One line an arm, one column a number of tokens: ms, and times faster than the base."""
    first = rows[0]
    base = BASES[first["operator"]]
    table = _table()
    for column in ("", "bits", "error"):
        table.add_column(column)
    for row in rows:
        table.add_column(f"M={row['tokens']}", justify="right")
    for name in dict.fromkeys(name for row in rows for name in row["arms"]):
        cells = [of_arm(row, name, base) if name in row["arms"] else "" for row in rows]
        arm = next(row["arms"][name] for row in rows if name in row["arms"])
        error = "" if arm["error"] is None else f"{arm['error']:.3f}"
        table.add_row(name, arm["scheme"], error, *cells, style="bold" if name in OURS else "")
    words = f"{first['operator']} {title(first)}: {clock(first)}, and x {base}; {rounds(rows)}"
    return Group(words, table)


def of_arm(row: Row, name: str, base: str) -> str:
    times = f" ({compare(row, name, base)[0]:.2f}x)" if base in row["arms"] else ""
    return milliseconds(row, name) + times


def clock(row: Row) -> str:
    kind = "CPU time" if row["clock"] == "cpu" else "wall time"
    return f"{count_words(row['threads'])}, ms of {kind}"


def of_goals(operator: str, rows: list[Row]) -> Group | str:
    """One line for each of our arms that a goal is about, or that stands for the operator."""
    base = BASES[operator]
    table = _table()
    for column in ("", "M", "ours", "ms", f"x {base}", "x best peer", "limit", "goals"):
        table.add_column(column, justify="right" if column in ("M", "ms", "limit") else "left")
    for row in rows:
        found = verdicts([row])
        first = (main_arm(row),) if main_arm(row) else ()
        for arm in dict.fromkeys((*first, *(verdict.goal.arm for verdict in found))):
            goals = [goal_words(verdict) for verdict in found if verdict.goal.arm == arm]
            table.add_row(*own_cells(row, arm, base), "\n".join(goals))
    words = f"Goals of {operator}: {clock(rows[0])}"
    return Group(words, table) if table.rows else f"{words}: none of ours was measured\n"


def own_cells(row: Row, arm: str, base: str) -> tuple[str, ...]:
    to_base = f"{compare(row, arm, base)[0]:.2f}" if base in row["arms"] else ""
    peer = best(row, peers(row))
    to_best = f"{compare(row, arm, peer)[0]:.2f} {peer}" if peer else ""
    start = title(row), str(row["tokens"]), arm, milliseconds(row, arm)
    return *start, to_base, to_best, share(row, arm)


def goal_words(verdict: Verdict) -> str:
    middle, low, high = verdict.ratio
    colour = "green" if verdict.reached else "red"
    most = f", at most {verdict.ceiling:.1f}" if verdict.ceiling else ""
    goal = f"{verdict.goal.at_least:g}x {verdict.goal.words}"
    return f"{goal}: {middle:.2f} ({low:.2f}-{high:.2f}{most}) [{colour}]{verdict.word}[/]"


def rounds(rows: list[Row]) -> str:
    counts = [len(arm["cpu"]) for row in rows for arm in row["arms"].values()]
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)})) + " rounds"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)
