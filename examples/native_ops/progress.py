"""What a run says while it goes on, and the words for a row."""

from __future__ import annotations

from arms import LEFT_OUT, WRONG, Row
from goals import best, compare
from limits import Limits
from names import BASES, MAIN, OURS
from rich.console import Console


class Progress:
    """One line for each row that is done; the work that goes on stands below them."""

    def __init__(self, threads: int) -> None:
        self.console = Console(soft_wrap=True)
        self.prefix = count_words(threads)
        self.status = self.console.status(self.prefix)
        self.status.start()
        self.left_out: list[str] = []
        self.wrong: list[str] = []

    def tell(self, words: str) -> None:
        """What is worked on; what is left out, or wrong, is said once."""
        kind, rest = words[:2], words[2:]
        if kind not in (LEFT_OUT, WRONG):
            self.status.update(f"{self.prefix}: {words}")
            return
        kept = self.wrong if kind == WRONG else self.left_out
        if rest not in kept:
            kept.append(rest)
            said, colour = ("WRONG", "bold red") if kind == WRONG else ("not measured", "yellow")
            self.console.print(f"{said}: {rest}", style=colour, markup=False)

    def limits(self, limits: Limits) -> None:
        self.console.print(f"{self.prefix}: {limit_words(limits)}", markup=False)

    def row(self, row: Row) -> None:
        words = f"{self.prefix}: {row['operator']} {title(row)}, M={row['tokens']}: "
        arm, base = main_arm(row), BASES[row["operator"]]
        shown = arm or (base if base in row["arms"] else next(iter(row["arms"])))
        words += f"{shown} {milliseconds(row, shown)} ms"
        if arm:
            others = (base, best(row, peers(row)))
            for other in dict.fromkeys(name for name in others if name and name in row["arms"]):
                words += f", {compare(row, arm, other)[0]:.2f}x {other}"
        self.console.print(words, markup=False)

    def stop(self) -> None:
        self.status.stop()


def limit_words(limits: Limits) -> str:
    rates = {"memory": (limits.dram, limits.dram_copy), "L3": (limits.l3, limits.l3_copy)}
    words = [
        f"{name} {read / 1e9:.1f} GB/s read, {copied / 1e9:.1f} copied"
        for name, (read, copied) in rates.items()
        if read and copied
    ]
    for kind in ("int8", "bf16"):
        rate, name = getattr(limits, kind), limits.names.get(kind, "")
        if rate:
            words.append(f"{kind} {rate / 1e12:.2f} TOPS ({name})")
    missing = {why for name, why in limits.names.items() if not getattr(limits, name)}
    if limits.int8 and limits.bf16:
        words.append(f"int8 / bf16 {limits.int8 / limits.bf16:.1f}")
    return ", ".join([*words, *(f"not measured: {why}" for why in sorted(missing))])


def title(row: Row) -> str:
    shape = " x ".join(str(number) for number in row["shape"])
    return f"{shape} {row['state']}"


def peers(row: Row) -> tuple[str, ...]:
    return tuple(name for name in row["arms"] if name not in OURS)


def main_arm(row: Row) -> str | None:
    return next((name for name in MAIN if name in row["arms"]), None)


def milliseconds(row: Row, arm: str) -> str:
    value = 1e3 * row["arms"][arm]["median"]
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def share(row: Row, arm: str) -> str:
    of_arm = row["arms"][arm]
    return f"{of_arm['floor'] / of_arm['median']:.0%}" if of_arm["floor"] else ""


def count_words(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"
