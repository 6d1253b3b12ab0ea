"""How much of tensor-parallel communication does the ladder hide? Against standard models, TP=2.

    make bench-ladder                 # or: python examples/ladder_residual/bench/overlap.py
    make bench-ladder ARGS="--real"   # also over a real link (root)

Real Megatron models in two processes on the CPU, over gloo and over links on which an all-reduce
takes 0.1 to 4 times as long as a module's compute: training with and without sequence parallelism,
prefill and decode. Prints tables; writes ``overlap.json``, ``overlap.png``, and of one step the
timeline ``trace.json`` (for chrome://tracing or Perfetto) and ``trace.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import netns
from results import plot, print_table, summarise
from variants import Shape

OUTPUT = Path(__file__).resolve().parents[3] / "out" / "bench_ladder"
RATIOS = [0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0]
MODES = ["training", "sequence parallel", "inference"]
RANKS = 2


def rank_main(rank: int, job: dict[str, Any]) -> None:
    """One process: Megatron on the CPU backend, then its measurements; rank 0 writes them down."""
    from megatron_plugins import cpu

    cpu.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from step import Bench, measure
    from timeline import trace

    shape, folder = Shape(**job["shape"]), Path(job["folder"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)

    def say(line: str) -> None:
        if rank == 0:
            print(f"{job['where']}, {mode}: {line}", file=sys.stderr, flush=True)

    records = {}
    for mode in job["modes"]:
        bench = Bench(mode, shape, RANKS)

        def set_link(seconds: float, bench: Any = bench) -> None:
            if job["real"]:
                netns.limit(8 * shape.message_bytes / seconds if seconds else None)
            else:
                bench.link.cost = seconds

        ratios, repetitions = job["ratios"], job["repetitions"]
        records[mode] = measure(bench, ratios, repetitions, shape.modules, set_link, say)
        if mode == "training" and not job["real"]:
            spans = trace(bench, set_link, shape)
            if rank == 0:
                (folder / "trace.json").write_text(json.dumps(spans))
        bench.remove()
    if rank == 0:
        (folder / "records.json").write_text(json.dumps(records))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(job: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Measure in two fresh processes; returns records by mode, and the spans of a trace."""
    with (
        tempfile.TemporaryDirectory() as folder,
        netns.pair() if job["real"] else nullcontext([None, None]) as names,
    ):
        job = {**job, "folder": folder}
        ranks = []
        for rank, name in enumerate(names):
            inside = ["ip", "netns", "exec", name] if name else []
            command = [*inside, sys.executable, __file__, "--rank", str(rank)]
            device = netns.DEVICE if name else "lo"
            environment = {
                **os.environ,
                "GLOO_SOCKET_IFNAME": device,
                "LADDER_JOB": json.dumps(job),
            }
            ranks.append(subprocess.Popen(command, env=environment))
        while any(codes := [process.poll() for process in ranks]) or None in codes:
            if any(codes):
                for process in ranks:
                    process.kill()
                sys.exit("a rank failed; its message is above")
            time.sleep(0.2)
        spans = Path(folder, "trace.json")
        return (
            json.loads(Path(folder, "records.json").read_text()),
            json.loads(spans.read_text()) if spans.exists() else None,
        )


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
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
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--real",
        action="store_true",
        help="also over a real link between two network namespaces, of limited rate; needs root",
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    for field in fields(Shape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    return parser.parse_args(argv)


def main() -> None:
    arguments = arguments_of()
    if arguments.rank is not None:
        rank_main(arguments.rank, json.loads(os.environ["LADDER_JOB"]))
        return
    if arguments.real and (reason := netns.missing()) is not None:
        sys.exit(f"--real: no link between network namespaces here: {reason}")
    shape = Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore")
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    arguments.output.mkdir(parents=True, exist_ok=True)
    job = {
        "shape": asdict(shape),
        "ratios": arguments.ratios,
        "repetitions": arguments.repetitions,
        "modes": arguments.modes,
    }
    results: dict[str, Any] = {"shape": asdict(shape)}
    for where in ("virtual link", *(["real link"] if arguments.real else [])):
        real = where == "real link"
        # A message of decoding is too small for a rate to matter.
        modes = [mode for mode in arguments.modes if not (real and mode == "inference")]
        ratios = [ratio for ratio in arguments.ratios if ratio or not real]
        records, spans = run(
            {**job, "modes": modes, "ratios": ratios, "real": real, "where": where}
        )
        rows = [row for found in records.values() for row in summarise(found, where)]
        results[where] = {"rows": rows, "repetitions": records}
        name = "overlap.png" if not real else "overlap_real.png"
        plot(rows, arguments.output / name, f"Ladder, TP={RANKS} on the CPU, {where}")
        print_table(rows, shape, RANKS, where)
        if spans is not None:
            from timeline import draw

            (arguments.output / "trace.json").write_text(json.dumps(spans) + "\n")
            draw(spans, arguments.output / "trace.png")
    (arguments.output / "overlap.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.output}/overlap.json, overlap.png, trace.json, trace.png")


if __name__ == "__main__":
    main()
