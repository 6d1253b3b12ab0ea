"""The tables of ``experiment.py``."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from experiment_arms import ARMS, INNER, RESIDUAL, Run, Settings

CHOICE = "RTN, static"
"""What the weight of the kurtosis is chosen by."""
COLUMNS = {
    "W16A16": "fp32, fp32",
    "W4A16\nRTN": "RTN, fp32",
    "W4A16\nGPTQ": "GPTQ, fp32",
    "W16A4\nstatic": "fp32, static",
    "W4A4\nstatic\nRTN": "RTN, static",
    "W4A4\nstatic\nGPTQ": "GPTQ, static",
    "W4A4\ntoken\nRTN": "RTN, token",
    "W4A4\ntoken\nGPTQ": "GPTQ, token",
}
"""Headings of the table, and what :mod:`experiment_measure` calls them."""
INPUTS = {"q, k, v": "q_proj", "gate, up": "gate_proj", "o": "o_proj", "down": "down_proj"}
"""Inputs of linear layers, and one that reads each: q, k and v share one, gate and up another."""


GROUPS = (("q to up", RESIDUAL), ("o, down", INNER))
HEADINGS = {
    "channels\nstart": ("start", 1),
    "channels\nmost": ("most", 1),
    "channels\nend": ("end", 1),
    "inputs\nkurtosis": ("kurtosis", 1),
    "outputs\nkurtosis": ("output", 1),
    "W\nkurtosis": ("weights", 2),
}
"""Of the second table, what :func:`_group` calls them, and digits."""


def kind(name: str) -> str:
    return name.rpartition(".")[2]


def summarise(settings: Settings, done: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant and arm; lists are by seed."""
    rows = []
    for variant in settings.variants:
        for arm in ARMS:
            found = [done[run] for run in done if (run.variant, run.arm) == (variant, arm)]
            perplexities = {
                name: [one["perplexities"][name] for one in found] for name in COLUMNS.values()
            }
            rows.append(
                {
                    "variant": variant,
                    "arm": arm,
                    "perplexities": perplexities,
                    "percentiles": [one["percentile"] for one in found],
                    "inputs": _inputs(found),
                    "groups": {g: [_group(one, kinds) for one in found] for g, kinds in GROUPS},
                }
            )
    return rows


def _inputs(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step, kind of input and layer: means over seeds of ``ratio`` and ``kurtosis``."""
    points = []
    for probes in zip(*(one["probes"] for one in found), strict=True):
        names = probes[0]["layers"]
        measures = {
            measure: {
                label: [
                    fmean(probe["layers"][name][measure] for probe in probes)
                    for name in names
                    if kind(name) == reader
                ]
                for label, reader in INPUTS.items()
            }
            for measure in ("ratio", "kurtosis")
        }
        points.append({"step": probes[0]["step"], **measures})
    return points


def _group(one: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, float]:
    """Means over the linear layers of these kinds, of one run: ``ratio`` at the start, at its most
    and at the end, ``kurtosis`` of the inputs and the ``output``, and of the ``weights``, whose
    rounding has an ``error``."""

    def mean(by_layer: dict[str, dict[str, float]], measure: str) -> float:
        return fmean(of[measure] for name, of in by_layer.items() if kind(name) in kinds)

    probes, weights = [probe["layers"] for probe in one["probes"]], one["weights"]
    ratios = [mean(layers, "ratio") for layers in probes]
    return {
        "start": ratios[0],
        "most": max(ratios),
        "when": one["probes"][ratios.index(max(ratios))]["step"],
        "end": ratios[-1],
        "kurtosis": mean(probes[-1], "kurtosis"),
        "output": mean(probes[-1], "output"),
        "weights": mean(weights, "kurtosis"),
        "error": mean(weights, "error"),
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and half the range where there are several."""
    text = f"{fmean(values):.{digits}f}"
    half = (max(values) - min(values)) / 2
    return text if len(values) == 1 else f"{text} ±{half:.{digits}f}"


def print_tables(
    settings: Settings, rows: list[dict[str, Any]], done: dict[Run, dict[str, Any]]
) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, width=max(132, Console().width))  # also into a file
    for variant in settings.variants:
        own = [row for row in rows if row["variant"] == variant]
        console.print(_perplexities(settings, variant, own))
        console.print(_measures(variant, own))
    console.print(
        "Perplexities of held-out text: means of seeds ± half their range. static: learned clips\n"
        "(inputs, both), else the best percentile; token: a scale for each token.\n"
        "channels: mean magnitude of an input's channels, largest over median, before training,\n"
        "at its most, after training. error: |W - Q(W)|^2 / |W|^2 of four bits. All are means\n"
        "over linear layers: q to up read the residual stream through a norm; o and down do not.\n"
        "Of seed 0: channels of q to up, outputs of o and down."
    )
    tried = sorted((run for run in done if run.seed == 0), key=lambda run: run.weight)
    if tried:
        console.print(_weights([(run, done[run]) for run in tried]))


def _weights(tried: list[tuple[Run, dict[str, Any]]]) -> Any:
    """What the weight of the kurtosis was chosen from."""
    from rich.table import Table

    table = Table(title=f"{tried[0][0].variant}, {tried[0][0].arm}, seed 0")
    names = {"W16A16": "fp32, fp32", "W16A4\nstatic": "fp32, static", "W4A4\nstatic\nRTN": CHOICE}
    for heading in ("weight of\nthe kurtosis", *names, "channels\nend", "outputs\nkurtosis"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run, found in tried:
        cells = [f"{found['perplexities'][name]:.2f}" for name in names.values()]
        reading, writing = (_group(found, kinds) for _, kinds in GROUPS)
        cells += [f"{reading['end']:.1f}", f"{writing['output']:.1f}"]
        table.add_row(f"{run.weight:g}", *cells)
    return table


def _perplexities(settings: Settings, variant: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    seeds = dict(settings.seeds)[variant]
    table = Table(
        title=f"{variant}: {settings.layers} layers of {settings.hidden_size}, "
        f"{settings.tokens:,} tokens, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    )
    table.add_column("arm", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [spread(row["perplexities"][name], 1) for name in COLUMNS.values()]
        table.add_row(row["arm"], *cells)
    return table


def _measures(variant: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"{variant}: outliers and weights")
    table.add_column("arm", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    for heading in (*HEADINGS, "W\nerror"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        for place, (group, _) in enumerate(GROUPS):
            means = {m: [one[m] for one in row["groups"][group]] for m in row["groups"][group][0]}
            cells = [spread(means[name], digits) for name, digits in HEADINGS.values()]
            cells.append(f"{fmean(means['error']):.3%}")
            table.add_row(row["arm"] if not place else "", group, *cells)
        table.add_section()
    return table
