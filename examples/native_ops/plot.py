"""A picture of the linear layer: how many times faster than bf16 every arm is, by tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from goals import compare
from names import BASES, OURS
from progress import count_words

DASHES = ("-", "--", "-.", ":")
MARKERS = "os^D"


def draw(result: dict[str, Any], path: Path) -> list[str]:
    """One panel for each shape, and each number of threads and state; the file, if there is any."""
    rows = [row for run in result["runs"] for row in run["rows"] if row["operator"] == "linear"]
    base = BASES["linear"]
    rows = [row for row in rows if base in row["arms"]]
    if not rows:
        return []
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    kinds = list(dict.fromkeys((row["threads"], row["state"]) for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row["arms"]))
    figure, panels = plt.subplots(
        len(kinds),
        len(shapes),
        figsize=(max(8, 4 * len(shapes)), 3 * len(kinds) + 1.5),
        dpi=130,
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for line, (threads, state) in zip(panels, kinds, strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            here = [
                row
                for row in rows
                if (tuple(row["shape"]), row["threads"], row["state"]) == (shape, threads, state)
            ]
            lines(axes, here, names, base)
            axes.set_title(f"{shape[0]} x {shape[1]}, {state}, {count_words(threads)}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks([row["tokens"] for row in here])
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.grid(alpha=0.3)
            axes.set_xlabel("tokens")
        line[0].set_ylabel(f"times faster than {base}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
        handlelength=5,
    )
    figure.savefig(path)
    plt.close(figure)
    return [str(path)]


def lines(axes: Any, rows: list[Any], names: list[str], base: str) -> None:
    """Ours thick and black, peers thin."""
    peers = [name for name in names if name not in OURS]
    for name in names:
        points = [row for row in rows if name in row["arms"]]
        ours = name in OURS
        index = [other for other in names if (other in OURS) == ours].index(name)
        axes.plot(
            [row["tokens"] for row in points],
            [compare(row, name, base)[0] for row in points],
            marker=MARKERS[index % len(MARKERS)] if ours else ".",
            markersize=5,
            linewidth=2 if ours else 1,
            linestyle=DASHES[index % len(DASHES)] if ours else "-",
            color="black" if ours else f"C{peers.index(name) % 10}",
            label=name,
        )
