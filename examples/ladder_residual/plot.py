"""Draw the loss curves of several runs into one figure."""

from __future__ import annotations

from pathlib import Path

from training_log import History

COLOURS = {"standard": "#4C72B0", "ladder": "#DD8452"}


def plot_losses(runs: dict[str, History], title: str, path: Path) -> None:
    """Training loss over tokens, as logged (faint) and smoothed, with the validation points.

    Args:
        runs: history by arm; the arms are the keys of :data:`COLOURS`.
        title: one line over the figure.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for name, run in runs.items():
        colour = COLOURS[name]
        thousands = [tokens / 1000 for tokens in run.tokens(run.iterations)]
        axes.plot(thousands, run.losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(thousands, run.smoothed(), color=colour, linewidth=2, label=f"{name}, training")
        axes.plot(
            [tokens / 1000 for tokens in run.tokens(run.valid_iterations)],
            run.valid_losses,
            color=colour,
            linestyle="none",
            marker="o",
            markersize=7,
            markeredgecolor="white",
            label=f"{name}, validation ({run.valid_losses[-1]:.3f} at the end)",
        )
    axes.set_title(title)
    axes.set_xlabel("tokens seen (thousands)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
