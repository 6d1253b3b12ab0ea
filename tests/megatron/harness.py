"""Run a real Megatron training of a tiny GPT in gloo processes on this machine.

    run = train("--tensor-model-parallel-size", 2, "--save", folder, processes=2)
    run.losses, run.grad_norms      # full precision, by iteration

Each process gets its place through RANK, WORLD_SIZE and MASTER_PORT; the first one that fails takes
the others with it, and its output is in the error.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TRAIN_GPT = Path(__file__).with_name("train_gpt.py")

TINY = shlex.split("""
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 20
    --exit-interval 6 --lr 1e-3 --lr-decay-style constant --eval-interval 1000 --eval-iters 0
    --log-interval 1 --save-interval 1000 --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 255 --mock-data --num-workers 0
    --use-cpu-initialization
""")
"""Six iterations of a GPT with 0.2 M parameters. A flag given again in a test wins.

Runs stop by ``--exit-interval``: a changed ``--train-iters`` trips the scheduler check on resume.
"""

CPU_FLAGS = shlex.split("""
    --transformer-impl local --distributed-backend gloo --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion
""")
"""What the CPU backend sets by itself, for runs with the plugins disabled."""

TIMED_OUT = -1

_LOG_LINE = re.compile(r"iteration +(\d+)/.*lm loss: (\S+).*grad norm: (\S+)")


@dataclass
class Run:
    """What a training left behind."""

    returncode: int
    """Of the first process that failed, else 0."""
    output: str
    """Output of all ranks, one after the other."""
    iterations: list[dict[str, float]]
    """``iteration``, ``lm loss``, ``grad_norm`` and what else is logged, exactly (train_gpt.py)."""

    @property
    def losses(self) -> dict[int, float]:
        return {int(line["iteration"]): line["lm loss"] for line in self.iterations}

    @property
    def grad_norms(self) -> dict[int, float]:
        return {int(line["iteration"]): line["grad_norm"] for line in self.iterations}

    @property
    def printed(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm as the log shows them, the only source for other scripts."""
        return {int(i): (float(x), float(g)) for i, x, g in _LOG_LINE.findall(self.output)}


def without(*flags: str) -> list[str]:
    """:data:`TINY` less some of its flags, each with its value."""
    words = list(TINY)
    for flag in flags:
        at = words.index(flag)
        del words[at : at + 2]
    return words


def train(
    *flags: object,
    processes: int = 1,
    tiny: Sequence[str] = TINY,
    script: Path = TRAIN_GPT,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 600,
) -> Run:
    """Train ``tiny`` with ``flags`` on top, in ``processes`` processes on the CPU backend.

    Raises:
        AssertionError: ``check`` and a process failed, or ``timeout`` seconds went by; the message
            holds the end of every rank's output.
    """
    command = [script, *tiny, *flags]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        environment = {
            "MEGATRON_PLUGINS_CPU": "1",
            "TRAIN_GPT_RECORD": str(record),
            **(environment or {}),
        }
        returncode, logs = launch(
            *command, processes=processes, environment=environment, check=check, timeout=timeout
        )
        lines = record.read_text().splitlines() if record.exists() else []
    return Run(returncode, "\n".join(logs), [json.loads(line) for line in lines])


def validated(
    monkeypatch: pytest.MonkeyPatch, *flags: object, world_size: int = 1
) -> tuple[Namespace, Any]:
    """Megatron's validated arguments, and the transformer configuration made from them."""
    from megatron.training import arguments

    command = ["pretrain_gpt.py", *TINY, "--transformer-impl", "local", *map(str, flags)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    args = arguments.parse_args()
    arguments.validate_args(args, {})
    return args, arguments.core_transformer_config_from_args(args)


def launch(
    *command: object,
    processes: int,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 600,
) -> tuple[int, list[str]]:
    """Run a Python script with its arguments as ``processes`` ranks over the loopback interface.

    A ``PYTHONPATH`` in ``environment`` goes before the one of this process, which may name another
    Megatron.

    Returns:
        Exit code of the first rank that failed, else 0, and the output of every rank.

    Raises:
        AssertionError: as :func:`train`.
    """
    command = (sys.executable, *(str(word) for word in command))
    places = (environment or {}, os.environ)
    paths = [place["PYTHONPATH"] for place in places if "PYTHONPATH" in place]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            **(environment or {}),
            **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}),
        }
        ranks = []
        for rank in range(processes):
            log = stack.enter_context((folder / f"{rank}.log").open("w"))
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        try:
            returncode = _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                _kill(process)
        logs = [(folder / f"{rank}.log").read_text() for rank in range(processes)]
    if check and returncode != 0:
        tails = "\n".join(f"--- rank {rank}\n{log[-4000:]}" for rank, log in enumerate(logs))
        cause = (
            f"not finished in {timeout} s" if returncode == TIMED_OUT else f"exit code {returncode}"
        )
        raise AssertionError(f"{cause}: {' '.join(command)}\n{tails}")
    return returncode, logs


LAYERS = {
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONPATH": str(TRAIN_GPT.parents[2]),
}
"""Environment of scripts that build Megatron's layers themselves."""


def run_cases(script: Path, folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Results by case of a script that writes a JSON line for each into the file it is given."""
    output = folder / "cases.jsonl"
    launch(script, output, processes=processes, environment=LAYERS, timeout=400)
    return {line.pop("case"): line for line in map(json.loads, output.read_text().splitlines())}


def known(case: dict[str, Any]) -> dict[str, Any]:
    """A case whose options the running Megatron has; else the test is skipped."""
    if "unknown" in case:
        pytest.skip(f"this Megatron has no {', '.join(case['unknown'])}")
    return case


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> int:
    """Exit code of the first process that fails; 0 when all succeed; or TIMED_OUT."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        for code in codes:
            if code:
                return code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
    return TIMED_OUT


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port nobody listens on, below the range from which the system hands out its own.

    Processes of pytest that share the tests never draw the same: each has every n-th.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.SystemRandom().randrange(20000 + worker, 32000, workers)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
