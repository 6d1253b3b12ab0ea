"""What the runs of ``compare.py`` found, as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from arms import ARMS, STOCK, WITH_EXPERTS, Run, Settings

COLOURS = dict(
    zip(ARMS, ("#4C72B0", "#64B5CD", "#55A868", "#DD8452", "#8C8C8C", "#C44E52"), strict=True)
)


def at(found: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The point that arms are tuned by: with ``settings.kept`` experts, or a dense model's."""
    keys = {("top-k", settings.kept), ("dense", 1)}
    return next(p for p in found["points"] if (p["rule"], p["value"]) in keys)


def summarise(
    settings: Settings, done: dict[Run, dict[str, Any]], best: dict[str, Run]
) -> list[dict[str, Any]]:
    """One row per arm; its points are means over the fresh seeds, losses also by seed."""
    rows = []
    for arm, chosen in best.items():
        fresh = [done[Run(arm, chosen.rate, chosen.weight, seed)] for seed in settings.seeds]
        parameters = fresh[0]["parameters"]
        points = []
        for same in zip(*(found["points"] for found in fresh), strict=True):
            share = mean(point["share"] for point in same)
            idle = round(parameters["mlp"] * (1 - share))
            points.append(
                {
                    **{name: same[0][name] for name in ("rule", "value")},
                    "share": share,
                    "active": parameters["layers"] - idle,
                    "losses": [point["loss"] for point in same],
                }
            )
        rows.append(
            {
                "arm": arm,
                "rate": chosen.rate,
                "weight": chosen.weight,
                "at_the_edge": chosen.rate in (settings.rates[0], settings.rates[-1]),
                **parameters,
                "points": points,
                "routers": [found["routers"] for found in fresh],
            }
        )
    return rows


def point_of(row: dict[str, Any], rule: str, value: float) -> dict[str, Any] | None:
    found = [p for p in row["points"] if (p["rule"], p["value"]) == (rule, value)]
    return found[0] if found else None


def spread(losses: list[float]) -> str:
    """Mean, and half the range."""
    return f"{mean(losses):.3f} ±{(max(losses) - min(losses)) / 2:.3f}"


def print_tables(settings: Settings, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, width=max(120, Console().width))  # also into a file
    console.print(arms_table(settings, rows))
    console.print("loss: nats per held-out token, mean of the seeds ± half their range")
    if any(row["at_the_edge"] for row in rows):
        console.print("* at the edge of the grid: the best may lie beyond")
    console.print(sweep_table(settings, rows))


def arms_table(settings: Settings, rows: list[dict[str, Any]]) -> Any:
    """Every arm with all its experts, and at the share it was tuned at."""
    from rich.table import Table

    tokens = settings.steps * settings.batch_size * settings.sequence_length
    table = Table(
        title=f"{settings.layers} layers of {settings.hidden_size}, {settings.experts} experts, "
        f"{tokens:,} tokens, {len(settings.seeds)} seeds"
    )
    table.add_column("arm", no_wrap=True)
    kept = f"{settings.kept} of {settings.experts}"
    for name in ("parameters", "lr", "MI", "all: loss", "active", f"{kept}: loss", "to dense"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = at(rows[0], settings)["losses"]
    for row in rows:
        whole, own = point_of(row, "top-k", settings.experts), at(row, settings)
        all_of = "-" if row["arm"] == STOCK else spread((whole or own)["losses"])
        differences = [a - b for a, b in zip(own["losses"], dense, strict=True)]
        table.add_row(
            row["arm"],
            f"{row['layers']:,}",
            f"{row['rate']:g}" + ("*" if row["at_the_edge"] else ""),
            f"{row['weight']:g}" if row["weight"] else "-",
            all_of,
            f"{own['active']:,}",
            spread(own["losses"]),
            f"{mean(differences):+.3f}",
        )
    return table


def sweep_table(settings: Settings, rows: list[dict[str, Any]]) -> Any:
    """Loss over K and thresholds; a threshold's share is each arm's own."""
    from rich.table import Table

    swept = [row for row in rows if len(row["points"]) > 1]
    table = Table(title="mean loss, and with a threshold the share of experts that tokens keep")
    for name in ("K or N S >", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in swept:
        table.add_column(row["arm"], justify="right", no_wrap=True)
    for k in range(1, settings.experts + 1):
        found = [point_of(row, "top-k", k) for row in swept]
        losses = [f"{mean(p['losses']):.3f}" for p in found if p]
        table.add_row(str(k), f"{k / settings.experts:.1%}", *losses)
    table.add_section()
    for threshold in settings.thresholds:
        found = [point_of(row, "threshold", threshold) for row in swept]
        cells = [f"{p['share']:.1%}  {mean(p['losses']):.3f}" if p else "" for p in found]
        table.add_row(f"{threshold:g}", "", *cells)
    return table


def draw(settings: Settings, rows: list[dict[str, Any]], path: Path) -> None:
    """Left: loss against the active share. Right: what is lost by dropping experts."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), dpi=120, layout="constrained")
    for row in rows:
        colour, arm = COLOURS[row["arm"]], row["arm"]
        own = at(row, settings)
        if len(row["points"]) == 1:
            share = settings.kept / settings.experts if "narrow" in arm else 1
            left.plot([share] * len(own["losses"]), own["losses"], "o", color=colour, alpha=0.35)
            left.plot(share, mean(own["losses"]), "D", color=colour, markersize=8, label=arm)
            continue
        for rule, line in (("top-k", "o-"), ("threshold", "x:")):
            points = [p for p in row["points"] if p["rule"] == rule]
            if not points:
                continue
            shares = [p["share"] for p in points]
            means = [mean(p["losses"]) for p in points]
            label = arm if rule == "top-k" else None
            left.plot(shares, means, line, color=colour, markersize=4, label=label)
            if rule == "top-k":
                edges = [[pick(p["losses"]) for p in points] for pick in (min, max)]
                left.fill_between(shares, *edges, color=colour, alpha=0.15, linewidth=0)
            if arm in WITH_EXPERTS:
                whole = mean((point_of(row, "top-k", settings.experts) or own)["losses"])
                right.plot(shares, [m - whole for m in means], line, color=colour, markersize=4)
        if arm == STOCK:
            left.plot(own["share"], mean(own["losses"]), "D", color=colour, markersize=8)
    limit(left, right, settings, rows)
    left.set_ylabel("validation loss (nats per token)")
    left.set_title("mean and range of the seeds; diamonds: as trained")
    right.set_ylabel("above the loss with all experts (nats)")
    right.set_title("what dropping experts costs; o top-K, x threshold")
    for axes in (left, right):
        axes.set_xlabel("active share of the MLP's parameters")
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def limit(left: Any, right: Any, settings: Settings, rows: list[dict[str, Any]]) -> None:
    """Leave out what is far above: losses of very few experts."""
    tuned = [loss for row in rows for loss in at(row, settings)["losses"]]
    least = min(loss for row in rows for point in row["points"] for loss in point["losses"])
    room = max(0.05, max(tuned) - least)
    left.set_ylim(least - 0.05 * room, max(tuned) + 0.5 * room)
    right.set_ylim(-0.02, 0.4)
