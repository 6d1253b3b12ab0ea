"""The comparison as a figure."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from compare_results import Results
from compare_settings import ARMS, Run, Settings

COLOURS = {"power": "#DD8452", "cosine": "#4C72B0", "WSD": "#55A868"}


def draw(results: Results, settings: Settings, path: Path) -> None:
    """Left: the grids of the tuning. Right: each cell's losses, above the best arm's mean there."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), dpi=100, layout="constrained")
    tuning = settings.cells[0]
    for arm in ARMS:
        grid, best = settings.grid(arm), results.best(arm, settings)
        rates = [highest_rate(arm, value, settings) for value in grid]
        losses = [fmean(results.losses(arm, value, tuning, settings)) for value in grid]
        left.plot(rates, losses, "o-", color=COLOURS[arm], label=f"{arm}, {ARMS[arm]} {best:g}")
        chosen = grid.index(best)
        left.plot(rates[chosen], losses[chosen], "o", color=COLOURS[arm], markersize=11)
    left.set_xscale("log")
    left.set_xlabel("learning rate at the end of the warm-up")
    left.set_ylabel("validation loss (nats per token)")
    left.set_title(f"tuned at {settings.label(tuning)}")
    left.legend(frameon=False)

    table = results.table(settings)
    for place in range(len(settings.cells)):
        least = min(fmean(losses[place]) for losses in table.values())
        for offset, (arm, losses) in enumerate(table.items()):
            x = place + 0.22 * (offset - 1)
            above = [loss - least for loss in losses[place]]
            right.bar(x, fmean(above), 0.2, color=COLOURS[arm], alpha=0.55)
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


def highest_rate(arm: str, value: float, settings: Settings) -> float:
    """Rate at the end of the warm-up, in the cell for tuning: comparable between the arms."""
    tokens, batch_size = settings.cells[0]
    schedule = Run(arm, value, tokens, batch_size, 0).schedule(settings)
    return float(schedule.rate(settings.warmup_tokens, batch_size * settings.sequence_length))
