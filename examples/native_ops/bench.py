"""The native operators against what else there is, in one run: times, ratios, goals, and limits.

    make bench-csrc                            # all of it: minutes, on a machine that is quiet
    make bench-csrc ARGS="--quick"             # a minute or two
    python examples/native_ops/bench.py        # without the peers that make installs

README.md says what is compared and how. Each number of threads has a process of its own, in which
all arms of a row take turns. Writes ``bench.json``, and ``bench.png`` with ``--plot``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from machine import cores, describe
from settings import OPERATORS, OUTPUT, QUICK, Settings, numbers

WORKER = Path(__file__).with_name("worker.py")


def run(settings: Settings, peers: str) -> dict[str, Any]:
    """Measure in a fresh process for each number of threads."""
    runs, machine = [], describe()
    for shapes, count in ((settings.shapes, 2), (settings.moe_shapes, 4)):
        for shape in shapes:
            numbers(shape, count)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "settings.json")
        given.write_text(json.dumps(asdict(settings)))
        for threads in settings.threads:
            if threads > len(cores()):
                print(f"{threads} threads: not measured, for want of cores")
                continue
            path = Path(folder, f"{threads}.json")
            quiet = {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
            environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, str(WORKER), str(given), peers, str(threads), str(path)]
            subprocess.run(command, env=environment, check=True)
            runs.append(json.loads(path.read_text()))
    if not runs:
        raise SystemExit("nothing was measured")
    return {"machine": machine, "settings": asdict(settings), "peers": peers, "runs": runs}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a minute or two: one thread, few shapes"
    )
    parser.add_argument("--plot", action="store_true", help="draw bench.png too")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument(
        "--peers",
        choices=("all", "torch", "eager"),
        default="all",
        help="torch: nothing that is not in torch and transformers; eager: nor torch.compile",
    )
    for field in fields(Settings):
        values = getattr(Settings, field.name)
        kind = type(values[0]) if isinstance(values, tuple) else type(values)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kind,
            nargs="*" if isinstance(values, tuple) else None,
            choices=OPERATORS if field.name == "operators" else None,
            help=f"default: {values}",
        )
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    typed = {f.name: getattr(chosen, f.name) for f in fields(Settings)}
    changes = {name: value for name, value in typed.items() if value is not None}
    result = run(replace(QUICK if chosen.quick else Settings(), **changes), chosen.peers)
    from goals import verdicts
    from table import show

    found = [verdict for run in result["runs"] for verdict in verdicts(run["rows"])]
    result["goals"] = [verdict.record() for verdict in found]
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / "bench.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    written = [str(path)]
    if chosen.plot:
        from plot import draw

        written += draw(result, chosen.output / "bench.png")
    print(f"written: {', '.join(written)}")
    sys.exit(any(run["wrong"] for run in result["runs"]))


if __name__ == "__main__":
    main()
