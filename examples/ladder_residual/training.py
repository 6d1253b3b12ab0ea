"""Run Megatron in its own processes, keep its log, and show what happens while it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from settings import ARMS, TENSOR_PARALLEL, Settings
from training_log import History

HERE = Path(__file__).resolve().parent
MARKER = ".ladder-residual-demo"


class DemoError(RuntimeError):
    """A step failed; the message names its log."""


def own_folder(folder: Path) -> Path:
    """An empty folder of the demo's own: what an earlier demo left there goes, nothing else does.

    Raises:
        DemoError: the folder exists and no demo made it.
    """
    if folder.exists():
        if not (folder / MARKER).exists():
            raise DemoError(f"{folder} exists and is not this demo's: move it, or choose --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def environment() -> dict[str, str]:
    """One thread per rank, or more where there are more cores; a GPU stays out of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // TENSOR_PARALLEL)),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextmanager
def run_logged(command: list[str], log: Path) -> Iterator[Iterator[str]]:
    """Start ``command`` and hand out its output line by line while it is written to ``log``.

    Raises:
        DemoError: the command failed; the message holds the end of its output.
    """
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        stdout = process.stdout
        assert stdout is not None

        def lines() -> Iterator[str]:
            for line in stdout:
                file.write(line)
                file.flush()
                yield line.rstrip()

        try:
            yield lines()
            for _ in lines():
                pass
            code = process.wait()
        finally:
            process.terminate()  # torchrun passes it on to its ranks
    if code:
        raise DemoError(f"exit code {code}:\n{last_words(log)}\n\nall of it: {log}")


def last_words(log: Path, count: int = 12) -> str:
    """The end of a failed run's output, without torchrun's own report of the failure."""
    lines = log.read_text(errors="replace").splitlines()
    report = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), None)
    return "\n".join(lines[:report][-count:])


def train(arm: str, settings: Settings, data: Path, output: Path, console: Console) -> History:
    """Train one arm with Megatron's own loop and return its curves.

    Writes ``output/<arm>``: ``log.txt``, ``history.json`` and ``checkpoint/``.
    """
    folder = own_folder(output / arm)
    flags = settings.megatron_flags(data, folder / "checkpoint")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(TENSOR_PARALLEL), str(HERE / "pretrain.py")]
    command += [*flags, *ARMS[arm]]
    history = History(settings.tokens_per_iteration)
    with (
        progress_bar(console) as progress,
        run_logged(command, folder / "log.txt") as lines,
    ):
        task = progress.add_task(arm, total=settings.iterations, loss="starting Megatron")
        for line in lines:
            if line.startswith("ladder-residual:"):
                progress.console.print(f"  {line}", highlight=False)
            if history.read(line):
                show(history, progress, task)
    if not history.valid_losses:
        raise DemoError(f"{arm}: no losses in Megatron's log {folder / 'log.txt'}")
    history.save(folder / "history.json")
    return history


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def show(history: History, progress: Progress, task: TaskID) -> None:
    """Move the bar; where the output is no terminal, print a line every tenth of the run."""
    total, iteration = int(progress.tasks[task].total or 1), history.iterations[-1]
    loss = f"loss {history.losses[-1]:.3f}"
    if history.valid_losses:
        loss += f", validation {history.valid_losses[-1]:.3f}"
    loss += f", {history.tokens_per_second:,.0f} tokens/s"
    moved = iteration > progress.tasks[task].completed
    progress.update(task, completed=iteration, loss=loss)
    if progress.disable and moved and iteration % max(1, total // 10) == 0:
        progress.console.print(f"  iteration {iteration:>4}/{total}: {loss}", highlight=False)
