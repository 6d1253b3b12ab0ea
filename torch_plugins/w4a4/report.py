"""The table and the picture of ``python -m torch_plugins.w4a4 report``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..feature import ConfigError
from ..power_lr_cli import show

Row = dict[str, Any]
WIDTH = 150
PARTS = ("inputs", "weights", "outputs")
LINES = {"nearest": "-", "quantized": "--"}
SHORT = {"nearest": "rtn", "quantized": "quant"}
TITLES = {"nearest": "round to nearest", "quantized": "the quantized folder"}


def print_table(rows: Sequence[Row], tokens: int) -> None:
    """One line a linear layer; errors in percent."""
    ways = list(rows[0]["errors"])
    title = (
        f"{len(rows)} linear layers, {tokens} tokens. Kurtosis of inputs and outputs; largest over "
        "median channel; range of inputs; errors in % of inputs, weights and outputs"
    )
    header = ["layer", "kurt in", "kurt out", "max/med in", "range", "clips"]
    header += [f"{part} {SHORT[way]}" for way in ways for part in ("in", "W", "out")]
    cells = [[_short(row["layer"]), *_cells(row, ways)] for row in rows]
    width = max(WIDTH, shutil.get_terminal_size().columns)  # rich would cut names off
    show(title, header, cells, last_apart=False, width=width)


def _cells(row: Row, ways: Sequence[str]) -> list[str]:
    span = lambda pair: "" if pair is None else f"{pair[0]:.3g}..{pair[1]:.3g}"  # noqa: E731
    errors = [f"{100 * row['errors'][way][part]:.3g}" for way in ways for part in PARTS]
    numbers = [
        f"{row[name]:.3g}" for name in ("input_kurtosis", "output_kurtosis", "input_outlier")
    ]
    return [*numbers, span(row["input_range"]), span(row["clips"]), *errors]


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel a quantity, a colour a kind of linear layer, over the decoder layers.

    Raises:
        ConfigError: matplotlib is not installed, or cannot write there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--output: needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels: dict[str, Callable[[Row], float]] = {
        "kurtosis of inputs": lambda row: row["input_kurtosis"],
        "kurtosis of outputs": lambda row: row["output_kurtosis"],
        "inputs: largest / median channel": lambda row: row["input_outlier"],
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), dpi=120, layout="constrained", sharex=True)
    for place, (title, value) in zip(axes.flat[:3], panels.items(), strict=True):
        _panel(place, rows, title, value, "-")
        place.set_yscale("log")
        for axis_formatter in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
            axis_formatter(lambda number, _: f"{number:g}")
    for place, part in zip(axes.flat[3:], PARTS, strict=True):
        for way in rows[0]["errors"]:
            _panel(place, rows, f"error of {part}, %", _error(way, part), LINES[way])
        place.set_ylim(bottom=0)
        place.set_xlabel("decoder layer")
    line = axes.flat[0].plot  # of nothing: an entry of the legend
    handles = [
        line([], [], color=f"C{index}", linewidth=4, label=kind)[0]
        for index, kind in enumerate(_kinds(rows))
    ]
    for way in rows[0]["errors"]:
        handles += line([], [], LINES[way], color="black", label=TITLES[way])
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {path}: {error}") from None
    finally:
        plt.close(figure)


def _error(way: str, part: str) -> Callable[[Row], float]:
    return lambda row: 100 * row["errors"][way][part]


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["layer"].rpartition(".")[2] for row in rows))


def _panel(
    place: Any, rows: Sequence[Row], title: str, value: Callable[[Row], float], style: str
) -> None:
    for index, kind in enumerate(_kinds(rows)):
        own = [row for row in rows if row["layer"].rpartition(".")[2] == kind]
        where = [_layer(row["layer"]) for row in own]
        place.plot(where, [value(row) for row in own], f"{style}o", color=f"C{index}", markersize=3)
    place.set_title(title)
    place.xaxis.get_major_locator().set_params(integer=True)
    place.grid(alpha=0.3)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)


def _short(name: str) -> str:
    """A layer's name from its number on."""
    parts = name.split(".")
    return ".".join(parts[parts.index(str(_layer(name))) :])


def _layer(name: str) -> int:
    """The decoder layer's number: the first in the name."""
    return next(int(part) for part in name.split(".") if part.isdecimal())
