"""The pictures of ``experiment.py``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from experiment_arms import ARMS, Settings
from experiment_results import INPUTS

COLOURS = dict(zip(INPUTS, ("#4C72B0", "#55A868", "#8172B3", "#DD8452"), strict=True))
MEASURES = {"ratio": "channels: largest / median", "kurtosis": "kurtosis per token"}
BARS = {
    "W16A16": ("fp32, fp32", "#B0B0B0"),
    "W4A16, GPTQ": ("GPTQ, fp32", "#4C72B0"),
    "W4A4 token, GPTQ": ("GPTQ, token", "#55A868"),
    "W4A4 static, RTN": ("RTN, static", "#8172B3"),
    "W4A4 static, GPTQ": ("GPTQ, static", "#DD8452"),
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _frame(axes: Any) -> None:
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_outliers(settings: Settings, rows: list[dict[str, Any]], path: Path) -> None:
    """Measures over training, a column for each arm; the deeper the layer, the darker the line."""
    plt = _pyplot()
    lines = [(variant, m) for variant in settings.variants for m in MEASURES]
    size = (12, 2.6 * len(lines))
    figure, grid = plt.subplots(
        len(lines), len(ARMS), figsize=size, dpi=80, layout="constrained", sharex=True, sharey="row"
    )
    for (variant, measure), panels in zip(lines, grid, strict=True):
        for arm, axes in zip(ARMS, panels, strict=True):
            [row] = [r for r in rows if (r["variant"], r["arm"]) == (variant, arm)]
            _outliers(axes, row, measure)
            axes.set_title(f"{variant}: {arm}", fontsize=10)
        panels[0].set_ylabel(MEASURES[measure])
    for axes in grid[-1]:
        axes.set_xlabel("step")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def _outliers(axes: Any, row: dict[str, Any], measure: str) -> None:
    from matplotlib.ticker import LogLocator

    steps = [point["step"] for point in row["inputs"]]
    for label, colour in COLOURS.items():
        curves = list(zip(*(point[measure][label] for point in row["inputs"]), strict=True))
        for depth, curve in enumerate(curves):
            alpha = 0.3 + 0.7 * (depth + 1) / len(curves)
            name = label if depth == len(curves) - 1 else None
            axes.plot(steps, curve, color=colour, alpha=alpha, linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    _frame(axes)


def draw_perplexities(settings: Settings, rows: list[dict[str, Any]], path: Path) -> None:
    """Bars are means, dots are seeds."""
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(settings.variants), figsize=(11, 4), dpi=90, layout="constrained", squeeze=False
    )
    for variant, axes in zip(settings.variants, panels[0], strict=True):
        own = [row for row in rows if row["variant"] == variant]
        for place, row in enumerate(own):
            for offset, (label, (name, colour)) in enumerate(BARS.items()):
                x = place + 0.16 * (offset - 2)
                values = row["perplexities"][name]
                axes.bar(x, fmean(values), 0.15, color=colour, label=label if not place else None)
                axes.plot([x] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(own)), [row["arm"] for row in own])
        least = min(min(values) for row in own for values in row["perplexities"].values())
        axes.set_ylim(bottom=0.9 * least)
        axes.set_title(variant)
        _frame(axes)
    panels[0][0].set_ylabel("perplexity of held-out text")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(BARS), frameon=False)
    figure.savefig(path)
    plt.close(figure)
