"""How much of the tensor-parallel all-reduce does the ladder hide? Standard against ladder, TP=2.

    make bench-ladder                 # or: python examples/ladder_residual/bench/overlap.py

Real Megatron layers in two processes on the CPU, over gloo and over virtual links that take 0.25 to
2 times as long as a module's compute (``link.py``). Prints a table; writes ``overlap.json`` and
``overlap.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any

from step import CONTROL, LADDER, LADDER_BOUND, STANDARD, Shape, measure

OUTPUT = Path(__file__).resolve().parents[3] / "out" / "bench_ladder"
RATIOS = [0.0, 0.25, 0.5, 1.0, 2.0]
RANKS = 2


def rank_main(rank: int, shape: Shape, ratios: list[float], repetitions: int, folder: str) -> None:
    """One process: Megatron on the CPU backend, then the measurement; rank 0 writes it down."""
    from megatron_plugins import cpu

    cpu.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    records = measure(shape, ratios, repetitions, RANKS)
    if rank == 0:
        Path(folder, "records.json").write_text(json.dumps(records))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(shape: Shape, ratios: list[float], repetitions: int) -> list[Any]:
    """Measure in two fresh processes."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        arguments = (shape, ratios, repetitions, folder)
        multiprocessing.spawn(rank_main, args=arguments, nprocs=RANKS)
        return json.loads(Path(folder, "records.json").read_text())


def ideal_forward(ratio: float, modules: int) -> float:
    """Ladder over standard when everything that can overlap does: compute c = 1, all-reduce a."""
    ladder = 1 + (modules - 1) * max(ratio, 1) + ratio
    return ladder / (modules * (1 + ratio))


def possible(ratio: float, modules: int) -> float:
    """Share of the communication that the ideal ladder hides, at most all but the last."""
    return (modules - 1) * min(ratio, 1) / (modules * ratio) if ratio else 0.0


def summarise(records: list[Any], ratios: list[float], modules: int) -> list[dict[str, Any]]:
    """One row per link and phase: medians over the repetitions, of quotients taken within one.

    ``hidden`` is (control - ladder) / (control - ladder without communication): of the time that
    waiting at once costs the ladder, the share that its overlap saves.
    """
    rows = []
    for phase in ("forward", "step"):
        for ratio in ratios:
            each = [
                {name: t[phase] for name, t in (r["links"][str(ratio)] | r["bounds"]).items()}
                for r in records
            ]
            lost = [t[CONTROL.name] - t[LADDER_BOUND.name] for t in each]
            saved = [t[CONTROL.name] - t[LADDER.name] for t in each]
            rows.append(
                {
                    "phase": phase,
                    "ratio": ratio,
                    "standard_ms": median(t[STANDARD.name] for t in each),
                    "ladder_ms": median(t[LADDER.name] for t in each),
                    "ladder": median(t[LADDER.name] / t[STANDARD.name] for t in each),
                    "control": median(t[CONTROL.name] / t[STANDARD.name] for t in each),
                    "ideal": ideal_forward(ratio, modules) if phase == "forward" else None,
                    "hidden": median(s / c for s, c in zip(saved, lost, strict=True)),
                    "possible": possible(ratio, modules) if phase == "forward" else None,
                }
            )
    return rows


def print_table(rows: list[dict[str, Any]], shape: Shape) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"TP={RANKS}, {shape.layers} layers of {shape.hidden_size}, "
        f"{shape.message_bytes / 2**20:.2f} MiB per all-reduce"
    )
    columns = ("phase", "link", "standard\nms", "ladder\nms", "ladder", "control", "hidden")
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        ideal = row["ideal"] if row["ratio"] else None
        table.add_row(
            row["phase"],
            f"{row['ratio']:g}" if row["ratio"] else "gloo",
            f"{row['standard_ms']:.1f}",
            f"{row['ladder_ms']:.1f}",
            f"{row['ladder']:.2f}" + (f" ({ideal:.2f})" if ideal else ""),
            f"{row['control']:.2f}",
            f"{row['hidden']:.0%}" + (f" ({row['possible']:.0%})" if ideal else ""),
        )
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        "link: time of an all-reduce over compute of a module. ladder, and the control (the\n"
        "ladder waiting at once): time over standard. hidden: share of that waiting which the\n"
        "overlap saves. In brackets: the ideal."
    )


def plot(rows: list[dict[str, Any]], modules: int, path: Path) -> None:
    """Ladder over standard against the speed of the link, with the ideal of the forward."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for phase, colour in (("forward", "#DD8452"), ("step", "#4C72B0")):
        points = [row for row in rows if row["phase"] == phase]
        ratios = [row["ratio"] for row in points]
        label = {"forward": "forward", "step": "forward and backward"}[phase]
        axes.plot(ratios, [r["ladder"] for r in points], "o-", color=colour, label=label)
        axes.plot(ratios, [r["control"] for r in points], "x:", color=colour, alpha=0.6)
    longest = max(row["ratio"] for row in rows)
    grid = [longest * i / 100 for i in range(101)]
    ideal = [ideal_forward(ratio, modules) for ratio in grid]
    axes.plot(grid, ideal, "--", color="grey", label="forward, ideal")
    axes.plot([], [], "x:", color="grey", label="control: the ladder waiting at once")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(f"Step time of the ladder, TP={RANKS} on the CPU over a virtual link")
    axes.set_xlabel("time of an all-reduce / compute of a module (0: gloo as it is)")
    axes.set_ylabel("ladder / standard")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=RATIOS,
        metavar="R",
        help="links, as time of an all-reduce over compute of a module; 0 is gloo as it is",
    )
    parser.add_argument("--repetitions", type=int, default=15)
    for field in fields(Shape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    arguments = parser.parse_args()
    shape = Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})

    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore")
    records = run(shape, arguments.ratios, arguments.repetitions)
    rows = summarise(records, arguments.ratios, shape.modules)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {"shape": asdict(shape), "rows": rows, "repetitions": records}
    (arguments.output / "overlap.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, shape.modules, arguments.output / "overlap.png")
    print_table(rows, shape)
    print(f"written: {arguments.output}/overlap.json, overlap.png")


if __name__ == "__main__":
    main()
