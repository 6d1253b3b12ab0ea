"""``python -m torch_plugins.power_lr table`` and ``... plot``.

    python -m torch_plugins.power_lr table --batch-size 256 1024 --tokens 10B 100B 1T
    python -m torch_plugins.power_lr plot --total-tokens 250B 1T --output power_lr.png

The table needs nothing (and is prettier with rich), the plot matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_plugins.config import DECAY_STYLES, ConfigError
from torch_plugins.config import PowerLR as PowerLRConfig
from torch_plugins.power_lr import BASE_SEQUENCE_LENGTH, Schedule, cosine, wsd

UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
LINES = {"power": "-", "cosine": "--", "WSD": ":"}


def token_count(text: str) -> int:
    """Read ``4096``, ``1e9``, ``250B`` or ``1.5T``."""
    unit = UNITS.get(text[-1:], 1)
    try:
        count = round(float(text if unit == 1 else text[:-1]) * unit)
    except (ValueError, OverflowError):
        count = -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number like 4096, 1e9, 250B or 1.5T")
    return count


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use an integer of at least 1")
    return int(text)


def short(tokens: float) -> str:
    """``25964051118`` as ``25.96B``."""
    if math.isinf(tokens):
        return "the end"
    unit = max((u for u in UNITS if tokens >= UNITS[u]), key=lambda u: UNITS[u], default="")
    return f"{tokens / UNITS.get(unit, 1):.4g}{unit}"


def schedule_of(arguments: argparse.Namespace, total: int | None, decay: int) -> Schedule:
    """The Power schedule that the options describe, for one horizon.

    Raises:
        ConfigError: options that do not go together.
    """
    power = PowerLRConfig(arguments.a, arguments.b, decay, arguments.decay_style)
    return Schedule(power, arguments.max_lr, arguments.warmup_tokens, total, arguments.min_lr)


def table(arguments: argparse.Namespace) -> None:
    """Print the rates at some token counts, one column per batch size."""
    schedule = schedule_of(arguments, arguments.total_tokens, arguments.decay_tokens)
    length, sizes = arguments.sequence_length, arguments.batch_size
    rates = {size: schedule.rate(arguments.tokens, size * length).tolist() for size in sizes}
    clipped = {size: schedule.crossover(size * length) for size in sizes}
    if arguments.json:
        print(json.dumps(machine_readable(schedule, arguments, rates, clipped), indent=2))
        return
    rows = [
        [short(tokens), *(f"{rates[size][row]:.6g}" for size in sizes)]
        for row, tokens in enumerate(arguments.tokens)
    ]
    rows.append(["clip ends", *(short(clipped[size]) for size in sizes)])
    title = (
        f"Power LR: a {arguments.a:g}, b {arguments.b:g}, max_lr {arguments.max_lr:g}, warm-up "
        f"{short(arguments.warmup_tokens)} tokens, sequences of {length} tokens"
    )
    show(title, ["tokens", *(f"batch {size}" for size in sizes)], rows)


def machine_readable(
    schedule: Schedule,
    arguments: argparse.Namespace,
    rates: dict[int, list[float]],
    clipped: dict[int, float],
) -> dict[str, Any]:
    """What ``table --json`` prints; ``clipped_until`` is null where the clip never ends."""
    settings = asdict(schedule)
    return {
        "schedule": settings.pop("power") | settings,
        "sequence_length": arguments.sequence_length,
        "clipped_until": {
            size: None if math.isinf(tokens) else tokens for size, tokens in clipped.items()
        },
        "rates": [
            {"tokens": tokens, "batch_size": size, "lr": lr}
            for size, column in rates.items()
            for tokens, lr in zip(arguments.tokens, column, strict=True)
        ],
    }


def show(
    title: str,
    header: list[str],
    rows: list[list[str]],
    last_apart: bool = True,
    width: int | None = None,
) -> None:
    """A table of numbers: drawn by rich where it is installed, else plain text.

    Args:
        width: columns that it may take; None: those of the terminal.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in (header, *rows):
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        return
    drawn = Table(title=title)
    for name in header:
        drawn.add_column(name, justify="right")
    for row in rows:
        drawn.add_row(*row, end_section=last_apart and row is rows[-2])
    Console(soft_wrap=True, width=width).print(drawn)


def plot(arguments: argparse.Namespace) -> None:
    """Draw Power, cosine and WSD over all horizons, one panel per batch size."""
    fraction, peak = arguments.decay_fraction, arguments.peak_lr
    if not 0 <= fraction <= 1:
        raise ConfigError(f"--decay-fraction {fraction}: must lie between 0 and 1")
    if not peak > arguments.min_lr:
        raise ConfigError(f"--peak-lr {peak}: must exceed --min-lr {arguments.min_lr}")
    ends = {"warmup_tokens": arguments.warmup_tokens, "min_lr": arguments.min_lr}
    curves = {}
    for total in sorted(arguments.total_tokens, reverse=True):
        decay = round(fraction * total)
        curves[total] = {
            "power": schedule_of(arguments, total, decay),
            "cosine": cosine(peak, total, **ends),
            "WSD": wsd(peak, total, decay, decay_style=arguments.decay_style, **ends),
        }
    try:
        draw(curves, arguments.batch_size, arguments.sequence_length, arguments.output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {arguments.output}: {error}") from None
    print(f"written: {arguments.output}")


def draw(curves: dict[int, dict[str, Schedule]], sizes: list[int], length: int, path: Path) -> None:
    """One panel per batch size; a colour per horizon, a line style per schedule."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import torch

    figure, panels = plt.subplots(
        1,
        len(sizes),
        figsize=(1 + 3.6 * len(sizes), 4.2),
        dpi=120,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, size in zip(panels[0], sizes, strict=True):
        for number, (total, schedules) in enumerate(curves.items()):
            tokens = torch.linspace(0, total, 2001, dtype=torch.float64)
            for name, schedule in schedules.items():
                width = 2 if name == "power" else 1.3
                rates = schedule.rate(tokens, size * length)
                axes.plot(tokens, rates, LINES[name], color=f"C{number}", linewidth=width)
        axes.set_title(f"batch of {size} sequences")
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0][0].set_ylabel("learning rate")
    line = panels[0][0].plot  # of nothing: an entry of the legend
    handles = [line([], [], style, color="black", label=name)[0] for name, style in LINES.items()]
    for number, total in enumerate(curves):
        label = f"run of {short(total)} tokens"
        handles += line([], [], color=f"C{number}", linewidth=4, label=label)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """Both commands; an option's default is the paper's where it has one."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    power = PowerLRConfig()
    add("--batch-size", type=positive, nargs="+", default=[128, 512, 1024], metavar="SEQUENCES")
    add("--sequence-length", type=positive, default=BASE_SEQUENCE_LENGTH, metavar="TOKENS")
    add("--a", type=float, default=power.a, help="default: %(default)s")
    add("--b", type=float, default=power.b, help="default: %(default)s")
    add("--max-lr", type=float, default=Schedule.max_lr, help="default: %(default)s")
    add("--min-lr", type=float, default=0.0, help="default: %(default)s")
    add("--warmup-tokens", type=token_count, default="1B", metavar="N", help="default: %(default)s")
    add("--decay-style", choices=DECAY_STYLES, default=power.decay_style)

    whole = argparse.ArgumentParser(
        prog="python -m torch_plugins.power_lr",
        description="The Power LR schedule in numbers and as a picture (arXiv 2408.13359).",
    )
    commands = whole.add_subparsers(dest="command", required=True)
    text = "rates at given token counts"
    add = commands.add_parser("table", parents=[common], help=text, description=text).add_argument
    add(
        "--tokens",
        type=token_count,
        nargs="+",
        metavar="N",
        default=[token_count(n) for n in ("0.5B", "1B", "10B", "100B", "1T", "2.5T")],
    )
    add("--total-tokens", type=token_count, metavar="N", help="where the last phase ends")
    add("--decay-tokens", type=token_count, default=0, metavar="N", help="length of the last phase")
    add("--json", action="store_true", help="for machines")

    text = "power against cosine and WSD, for several batch sizes and horizons"
    add = commands.add_parser("plot", parents=[common], help=text, description=text).add_argument
    horizons = [token_count("250B"), token_count("1T")]
    add("--total-tokens", type=token_count, nargs="+", default=horizons, metavar="N")
    add(
        "--decay-fraction", type=float, default=0.1, help="last phase of power and WSD; %(default)s"
    )
    add("--peak-lr", type=float, default=0.01, help="of cosine and WSD; default: %(default)s")
    add("--output", type=Path, default=Path("power_lr.png"), help="default: %(default)s")
    return whole


def main(argv: list[str] | None = None) -> None:
    """Run one command; what is wrong with its options goes to stderr, exit code 2."""
    whole = parser()
    arguments = whole.parse_args(argv)
    try:
        {"table": table, "plot": plot}[arguments.command](arguments)
    except ConfigError as error:
        whole.error(str(error))
    except ImportError as error:
        whole.error(f"plot draws with matplotlib ({error}): pip install matplotlib")
