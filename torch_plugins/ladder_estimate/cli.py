"""``python -m torch_plugins.ladder_residual estimate`` and ``... check``.

python -m torch_plugins.ladder_residual estimate --model llama-3.1-70b --tp 8 --link nvlink
python -m torch_plugins.ladder_residual estimate --standard-ms 12.9 --no-communication-ms 9.0
python -m torch_plugins.ladder_residual check
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import parse_layers
from ..feature import ConfigError
from ..power_lr_cli import positive
from . import schedule
from .check import scores, tokens_per_second_errors, verdicts
from .constants import DATA_SHEET, FITTED, Constants
from .estimate import GENERATE, PROMPT, Cluster, Estimate, Work, cluster, estimate, memory
from .fit import fit
from .hardware import GPUS, LINKS, Link
from .paper import CELLS, FITTED_ON
from .report import check_json, estimate_rows, print_cells, print_estimate, print_scores
from .roofline import PAPER, SERVING
from .shapes import MODELS, Shape, from_config


def positives(text: str) -> list[int]:
    """Read ``1,4,16``."""
    return [positive(part.strip()) for part in text.split(",")]


def quantity(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number above 0")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number from 0 to 1")
    return value


def run_estimate(arguments: argparse.Namespace) -> None:
    """Print one form or the other."""
    shape = shape_of(arguments)
    if arguments.standard_ms is not None or arguments.no_communication_ms is not None:
        return print_measured(arguments, shape)
    if shape is None:
        raise ConfigError(
            "--model: which one? Give a name, --config with a model's config.json, or "
            "--standard-ms and --no-communication-ms"
        )
    layers = parse_layers(arguments.layers, shape.layers, "--layers")
    machine, constants = machine_of(arguments), constants_of(arguments)
    engine = PAPER if arguments.paper_benchmark else SERVING
    shape.per_rank(machine.tp)
    works = [
        Work(batch, arguments.prompt, arguments.generate, engine, layers, arguments.desync)
        for batch in arguments.batch
    ]
    found = [estimate(shape, machine, work, constants) for work in works]
    notes = notes_of(arguments, shape, works)
    if arguments.json:
        report = {"constants": asdict(constants), "notes": notes, "estimates": estimate_rows(found)}
        print(json.dumps(report, indent=2))
        return None
    print_estimate(title_of(arguments, machine.nodes, len(layers), found), found, arguments.desync)
    print("\n".join(notes))
    return None


def shape_of(arguments: argparse.Namespace) -> Shape | None:
    if arguments.model is not None and arguments.config is not None:
        raise ConfigError("--model and --config: give one of them")
    if arguments.config is not None:
        return from_config(arguments.config)
    return None if arguments.model is None else MODELS[arguments.model]


def machine_of(arguments: argparse.Namespace) -> Cluster:
    """The cluster that the options describe.

    Raises:
        ConfigError: options that do not go together.
    """
    tp, nodes = arguments.tp, arguments.nodes
    if tp % nodes:
        raise ConfigError(f"--nodes {nodes}: must divide --tp {tp}")
    if arguments.link == "ib" and nodes not in (1, tp):
        raise ConfigError(
            f"--nodes {nodes}: --link ib puts every rank on a node of its own; for several "
            "GPUs a node give the link within it, --link nvlink or pcie"
        )
    machine = cluster(GPUS[arguments.gpu], tp, arguments.link, nodes)
    bandwidth, latency = arguments.bandwidth, arguments.latency
    if bandwidth is None and latency is None:
        return machine
    if bandwidth is None or latency is None:
        missing = "--bandwidth" if bandwidth is None else "--latency"
        raise ConfigError(f"{missing}: --bandwidth and --latency go together; give both")
    return replace(machine, measured=Link(bandwidth * 1e9, latency * 1e-6, 0.0))


def constants_of(arguments: argparse.Namespace) -> Constants:
    base = DATA_SHEET if arguments.data_sheet else FITTED
    contention = arguments.contention
    return base if contention is None else replace(base, contention=contention)


def title_of(arguments: argparse.Namespace, nodes: int, ladder: int, found: list[Estimate]) -> str:
    link = arguments.link
    if arguments.bandwidth is not None:
        link = f"{arguments.bandwidth:g} GB/s and {arguments.latency:g} us"
    return (
        f"{arguments.model or arguments.config}, {ladder} ladder layers, TP {arguments.tp} on "
        f"{nodes} node{'s' * (nodes > 1)} of {arguments.gpu}, {link}; prompts "
        f"of {arguments.prompt}, {arguments.generate} generated; an all-reduce of a token's pass "
        f"{1e6 * found[0].decode.reduce:.1f} us"
    )


def notes_of(arguments: argparse.Namespace, shape: Shape, works: list[Work]) -> list[str]:
    """What a reader must know of these numbers."""
    notes = [f"{arguments.gpu}: {GPUS[arguments.gpu].source}"]
    if arguments.data_sheet:
        notes.append("Nothing is fitted: every peak is reached, and kernels start at once.")
    else:
        notes.append("Shares of these peaks are fitted on the paper's 70B on H100, not on yours.")
    if arguments.bandwidth is None and (arguments.nodes > 1 or arguments.link == "ib"):
        notes.append(
            "Between nodes nothing is fitted: the paper's 405B over two nodes gained more than "
            "this says (check). Better: --bandwidth and --latency, as nccl-tests prints them."
        )
    capacity = GPUS[arguments.gpu].capacity
    for work in works:
        needed = memory(shape, arguments.tp, work)
        if needed > capacity:
            notes.append(
                f"Batch {work.batch} does not fit: {needed / 1e9:.0f} GB a rank, and "
                f"{arguments.gpu} has {capacity / 1e9:.0f}."
            )
    notes.append("To decide, measure: --standard-ms and --no-communication-ms. How far off: check.")
    return notes


def print_measured(arguments: argparse.Namespace, shape: Shape | None) -> None:
    """A ladder from two measured times."""
    standard, bound = arguments.standard_ms, arguments.no_communication_ms
    if standard is None or bound is None:
        missing = "--standard-ms" if standard is None else "--no-communication-ms"
        raise ConfigError(f"{missing}: two times are needed; give both")
    if standard < bound:
        raise ConfigError(
            f"--standard-ms {standard:g}: is less than --no-communication-ms {bound:g}; the first "
            "must contain the second's work and the all-reduces"
        )
    modules = arguments.modules
    if modules is None and shape is not None:
        modules = 2 * shape.layers
    layers = None
    if arguments.layers != "all":
        if modules is None or modules % 2:
            raise ConfigError(
                f"--layers {arguments.layers}: of how many? Give --model, --config or an even "
                "--modules"
            )
        layers = parse_layers(arguments.layers, modules // 2, "--layers")
    contention = constants_of(arguments).contention
    times = {
        "standard": standard,
        "ladder": schedule.from_measured(standard, bound, contention, modules, layers),
        "ladder, ideal overlap": schedule.from_measured(standard, bound, 0.0, modules, layers),
        "no communication": bound,
    }
    if arguments.json:
        report = {"contention": contention, "modules": modules, "ms": times}
        report["speedup"] = {name: standard / time for name, time in times.items()}
        print(json.dumps(report, indent=2))
        return
    for name, time in times.items():
        exposed = 100 * (1 - bound / time)
        print(f"{name:22} {time:10.4g} ms  {standard / time:6.3f}x  exposed comm {exposed:5.1f} %")
    print(f"Contention {contention:g}, fitted on the paper's 70B; --contention tells another.")


def run_check(arguments: argparse.Namespace) -> None:
    """Print every cell, the errors, and what they mean."""
    if arguments.refit:
        found = fit([cell for cell in CELLS if cell.table in FITTED_ON])
        same = "as compiled in" if found == FITTED else f"compiled in is {FITTED}"
        print(f"{found}\n{same}")
        return
    errors = scores()
    claims = verdicts(errors)
    if arguments.json:
        print(json.dumps(check_json(errors, claims), indent=2))
        return
    print_cells()
    print_scores(errors)
    for table, error in tokens_per_second_errors().items():
        print(f"Standard model's tokens/s, fitted constants, {table}: {100 * error:.1f} % off")
    print("On held-out tables:")
    for claim, true in claims:
        print(f"  {'yes' if true else 'NO '}  {claim}")
    if not all(true for _, true in claims):
        print(
            "Where it says NO, one well-chosen number is as good as the model: measure, and give "
            "estimate the --standard-ms and --no-communication-ms."
        )


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m torch_plugins.ladder_residual",
        description="What Ladder Residual would gain in tensor-parallel inference "
        "(arXiv 2501.06589). Training steps are not estimated.",
    )
    commands = whole.add_subparsers(dest="command", required=True)
    text = "a ladder's speed from data sheets, or from two times that you measured"
    add_estimate(commands.add_parser("estimate", help=text, description=text))
    text = "compare the estimates with the paper's measurements"
    add: Any = commands.add_parser("check", help=text, description=text).add_argument
    add("--refit", action="store_true", help="fit the constants again, and print them")
    add("--json", action="store_true", help="for machines")
    return whole


def add_estimate(command: argparse.ArgumentParser) -> None:
    add: Any = command.add_argument
    add("--model", choices=MODELS, help="sizes of a release")
    add(
        "--config",
        type=Path,
        metavar="PATH",
        help="config.json of a Llama-like model, or its folder",
    )
    add("--tp", type=positive, default=8, help="tensor-parallel ranks; default: %(default)s")
    add(
        "--nodes", type=positive, default=1, help="that these are spread over; default: %(default)s"
    )
    add("--gpu", choices=GPUS, default="h100", help="default: %(default)s")
    add(
        "--link",
        choices=LINKS,
        default="nvlink",
        help="between the GPUs of a node; pcie: through host memory; ib: every rank is a node of "
        "its own; default: %(default)s",
    )
    add(
        "--bandwidth",
        type=quantity,
        metavar="GB/S",
        help="in place of --link: bus bandwidth of a large all-reduce, as nccl-tests prints it",
    )
    add("--latency", type=quantity, metavar="US", help="with it: time of a small all-reduce")
    add("--batch", type=positives, default=[1, 4, 16, 64], metavar="N,N", help="default: 1,4,16,64")
    add("--prompt", type=positive, default=PROMPT, metavar="TOKENS", help="default: %(default)s")
    add(
        "--generate", type=positive, default=GENERATE, metavar="TOKENS", help="default: %(default)s"
    )
    add("--layers", default="all", metavar="SPEC", help="ladder layers, as for --ladder-layers")
    add(
        "--desync",
        type=positive,
        default=2,
        metavar="N",
        help="of desync residual one in N all-reduces is left; default: %(default)s",
    )
    add(
        "--paper-benchmark",
        action="store_true",
        help="compute what the paper's benchmark does: expanded keys and values, the whole cache, "
        "all logits on every rank",
    )
    add("--data-sheet", action="store_true", help="data sheets alone, no fitted constant")
    add(
        "--contention",
        type=share,
        metavar="SHARE",
        help="of the shorter of two overlapped kernels that is not hidden; default: "
        f"{FITTED.contention}, fitted",
    )
    add("--standard-ms", type=quantity, metavar="MS", help="measured time of the standard model")
    add(
        "--no-communication-ms",
        type=quantity,
        metavar="MS",
        help="the same with its all-reduces left out",
    )
    add("--modules", type=positive, metavar="N", help="of that model: two a layer")
    add("--json", action="store_true", help="for machines")


def main(argv: list[str] | None = None) -> None:
    """Run one command; what is wrong with its options goes to stderr, exit code 2."""
    whole = parser()
    arguments = whole.parse_args(argv)
    try:
        {"estimate": run_estimate, "check": run_check}[arguments.command](arguments)
    except ConfigError as error:
        whole.error(str(error))
