"""The ladder benchmark: its virtual link, its arithmetic, and a small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.quiet

BENCH = Path(__file__).resolve().parents[2] / "examples" / "ladder_residual" / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Any]:
    from link import Link

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Link(dist.group.WORLD)
    dist.destroy_process_group()


def elapsed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_link_is_serial_and_overlaps_compute(link: Any) -> None:
    link.cost = 0.1
    message, whole = torch.ones(4), torch.empty(4)
    works: list[Any] = []

    def launch() -> None:
        works.append(dist.all_reduce(message, group=link, async_op=True))
        works.append(dist.all_gather_into_tensor(whole, message, group=link, async_op=True))

    assert elapsed(launch) < 0.05
    assert elapsed(works[0].wait) == pytest.approx(0.1, abs=0.03)
    assert elapsed(works[1].wait) == pytest.approx(0.05, abs=0.03)  # half an all-reduce
    assert torch.equal(whole, message)


def test_link_waits_when_the_caller_does_and_when_told(link: Any) -> None:
    link.cost = 0.05
    message = torch.ones(4)
    assert elapsed(lambda: dist.all_reduce(message, group=link)) >= 0.05
    link.synchronous = True
    assert elapsed(lambda: dist.all_reduce(message, group=link, async_op=True)) >= 0.05
    link.connected = False
    assert elapsed(lambda: dist.all_reduce(message, group=link)) < 0.05


def record(standard: float, ladder: float, control: float) -> dict[str, Any]:
    from variants import (
        CONTROL,
        DESYNC,
        LADDER,
        LADDER_BOUND,
        PARALLEL,
        STANDARD,
        STANDARD_BOUND,
        WAITING,
    )

    times = {
        STANDARD.name: standard,
        WAITING.name: standard + 1,
        PARALLEL.name: 12,
        DESYNC.name: 11,
    }
    times |= {LADDER.name: ladder, CONTROL.name: control}
    bounds = {STANDARD_BOUND.name: 8.0, LADDER_BOUND.name: 8.0}

    def phases(of: dict[str, float]) -> dict[str, Any]:
        return {name: {"forward": time, "step": 3 * time} for name, time in of.items()}

    modules = {"forward": [1.0] * 8, "backward": [2.0] * 8}
    links = {"forward": {"1.0": phases(times)}}
    return {"links": links, "bounds": phases(bounds), "modules": modules}


def test_ideal_and_hidden_share() -> None:
    from results import exposed, summarise

    one = record(16, 10, 16)
    assert exposed(1, "forward", one) == 1  # all but the last under the next module
    assert exposed(3, "forward", one) == 2 * 7 + 3
    assert exposed(3, "step", one) == 2 * 7 + 3 + 1 * 7 + 3

    records = [one, record(20, 13, 18), record(16, 99, 16)]  # the last one disturbed
    forward, step = summarise(records, "virtual link")
    assert forward["standard_ms"] == 16  # the better one of the two
    assert forward["ladder"] == 0.65
    assert forward["ideal"] == 9 / 16
    assert forward["no_communication"] == 0.5
    assert (forward["parallel"], forward["desync"]) == (0.75, 11 / 16)
    assert forward["control"] == pytest.approx(16 / 17)
    assert forward["hidden"] == 0.5  # (18 - 13) / (18 - 8)
    assert (forward["goal"], forward["met"]) == (0.62, False)
    assert (step["phase"], step["ladder_ms"], step["exposed_ms"]) == ("step", 39, 15)


SMALL = ("--layers", 2, "--hidden-size", 64, "--heads", 4, "--ffn-hidden-size", 96)
SMALL = (*SMALL, "--sequence-length", 16, "--batch-size", 1)


def test_small_run(tmp_path: Path) -> None:
    more = ("--ratios", 0, 20, "--repetitions", 3)
    command = [sys.executable, BENCH / "overlap.py", "--output", tmp_path, *SMALL, *more]
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "overlap.json").read_text())
    for picture in ("overlap.png", "trace.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    rows = {(row["phase"], row["ratio"]): row for row in found["virtual link"]["rows"]}
    phases = ("forward", "step", "sp forward", "sp step", "prefill", "decode")
    assert list(rows) == [(phase, ratio) for phase in phases for ratio in (0.0, 20.0)]
    # Communication is all: 4 reductions forward; standard hides none of them and the ladder one.
    assert 0.6 < rows["forward", 20.0]["ladder"] < 1.1
    assert 0.4 < rows["forward", 20.0]["parallel"] < 0.7

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for process in (0, 1):
        names = [span["name"] for span in spans if span["pid"] == process and not span["tid"]]
        assert names[:4] == ["attention 0", "MLP 0", "attention 1", "MLP 1"]
        assert set(names[4:]) == {f"{name} backward" for name in names[:4]}
        sent = [span for span in spans if span["pid"] == process and span["tid"] == 1]
        assert len(sent) == 8


def test_a_real_link_is_limited_and_goes_away() -> None:
    import netns

    if (reason := netns.missing()) is not None:
        pytest.skip(reason)

    def inside(name: str, *command: str) -> str:
        words = ["ip", "netns", "exec", name, *command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    with netns.pair() as names:
        program = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import netns; netns.limit(2e8)"
        inside(names[0], sys.executable, "-c", program)
        assert "rate 200Mbit" in inside(names[0], "tc", "qdisc", "show", "dev", netns.DEVICE)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert names[0] not in left
