"""The ladder benchmark: its virtual link, its arithmetic, and a small run of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.quiet

BENCH = Path(__file__).resolve().parents[2] / "examples" / "ladder_residual" / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def link(tmp_path):
    from link import Link

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    link = Link()
    link.install()
    yield link
    link.remove()
    dist.destroy_process_group()


def elapsed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_link_is_serial_and_overlaps_compute(link):
    link.latency, link.bandwidth = 0.05, 4e6
    message = torch.ones(50_000)  # 0.05 s at 4 MB/s
    works = []
    launch = elapsed(lambda: works.extend(dist.all_reduce(message, async_op=True) for _ in "ab"))
    assert launch < 0.05
    first = elapsed(works[0].wait)
    second = elapsed(works[1].wait)
    assert first == pytest.approx(0.1, abs=0.03)
    assert second == pytest.approx(0.1, abs=0.03)


def test_link_waits_when_the_caller_does_and_when_told(link):
    link.latency = 0.05
    message = torch.ones(4)
    assert elapsed(lambda: dist.all_reduce(message)) >= 0.05
    link.synchronous = True
    assert elapsed(lambda: dist.all_reduce(message, async_op=True)) >= 0.05
    link.connected = False
    assert elapsed(lambda: dist.all_reduce(message)) < 0.05


def test_ideal_and_hidden_share():
    from overlap import ideal_forward, possible, summarise
    from step import CONTROL, LADDER, LADDER_BOUND, STANDARD, STANDARD_BOUND

    assert ideal_forward(0, 8) == 1  # nothing to hide
    assert ideal_forward(1, 8) == 9 / 16  # all but the last reduction under the next module
    assert ideal_forward(3, 1) == 1  # one module: nothing to hide it under

    assert possible(0.5, 8) == possible(1, 8) == 7 / 8
    assert possible(2, 8) == 7 / 16  # the link is busy twice as long as the compute

    def record(standard, ladder, control):
        times = {STANDARD.name: standard, LADDER.name: ladder, CONTROL.name: control}
        bounds = {STANDARD_BOUND.name: 8.0, LADDER_BOUND.name: 8.0}
        both = ({k: {"forward": v, "step": 3 * v} for k, v in t.items()} for t in (times, bounds))
        return {"links": {"1.0": next(both)}, "bounds": next(both)}

    records = [record(16, 10, 16), record(20, 13, 18), record(16, 99, 16)]  # the last one disturbed
    forward, step = summarise(records, [1.0], modules=8)
    assert forward["standard_ms"] == 16
    assert forward["ladder"] == 0.65
    assert forward["control"] == 1
    assert forward["hidden"] == 0.5  # (18 - 13) / (18 - 8)
    assert (step["phase"], step["ladder_ms"], step["hidden"]) == ("step", 39, 0.5)


def test_small_run(tmp_path):
    command = [sys.executable, str(BENCH / "overlap.py"), "--output", str(tmp_path)]
    command += ["--layers", "2", "--hidden-size", "64", "--heads", "4"]
    command += ["--sequence-length", "16", "--batch-size", "1"]
    result = subprocess.run(
        [*command, "--ratios", "0", "20", "--repetitions", "3"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "overlap.json").read_text())["rows"]
    assert [(row["phase"], row["ratio"]) for row in rows] == [
        *(("forward", 0.0), ("forward", 20.0)),
        *(("step", 0.0), ("step", 20.0)),
    ]
    # Communication is all: 4 reductions forward; standard hides none of them and the ladder one.
    slow = rows[1]
    assert 0.6 < slow["ladder"] < 1.1
