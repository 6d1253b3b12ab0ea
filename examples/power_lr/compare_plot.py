"""The comparison as a figure."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import torch
from compare_results import Results
from compare_settings import ARMS, Run, Settings, numbers

COLOURS = {"power": "#DD8452", "published": "#8172B3", "cosine": "#4C72B0", "WSD": "#55A868"}


def draw(results: Results, settings: Settings, path: Path) -> None:
    """Left: the grids of the tuning. Right: each cell's losses, above the best arm's mean there."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), dpi=100, layout="constrained")
    tuning = settings.cells[0]
    for arm, colour in COLOURS.items():
        losses, best = results.tuning(arm, settings), results.best(arm, settings)
        points = [(mean_rate(arm, values, settings), loss) for values, loss in losses.items()]
        line = "-" if len(best) == 1 else ""
        label = f"{arm}, {ARMS[arm]} {numbers(best)}"
        left.plot(*zip(*points, strict=True), "o" + line, color=colour, label=label)
        chosen = mean_rate(arm, best, settings), losses[best]
        left.plot(*chosen, "o", color=colour, markersize=12, alpha=0.5)
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("mean learning rate of the run")
    left.set_ylabel("validation loss (nats per token)")
    left.set_title(f"tuned at {settings.label(tuning)}")
    left.legend(frameon=False)

    table = results.table(settings)
    for place in range(len(settings.cells)):
        least = min(fmean(losses[place]) for losses in table.values())
        for offset, (arm, losses) in enumerate(table.items()):
            x = place + 0.2 * (offset - 1.5)
            above = [loss - least for loss in losses[place]]
            right.bar(x, fmean(above), 0.18, color=COLOURS[arm], alpha=0.55)
            right.plot([x] * len(above), above, "o", color=COLOURS[arm], markersize=4)
    right.set_xticks(range(len(settings.cells)), [settings.label(c) for c in settings.cells])
    right.set_ylabel("validation loss above the best arm's mean (nats)")
    right.set_title("carried over; bars are means, dots are seeds")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def mean_rate(arm: str, values: tuple[float, ...], settings: Settings) -> float:
    """Of a run in the cell for tuning: one number that compares schedules of different shapes."""
    tokens, batch_size = settings.cells[0]
    batch_tokens = batch_size * settings.sequence_length
    schedule = Run(arm, values, tokens, batch_size, 0).schedule(settings)
    return float(schedule.rate(torch.arange(0, tokens, batch_tokens), batch_tokens).mean())
