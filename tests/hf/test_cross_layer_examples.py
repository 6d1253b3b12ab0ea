"""The examples of Cross-Layer Attention: small runs, and the arithmetic of their tables."""

import json
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cross_layer_attention"


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_benchmark(monkeypatch, tmp_path, capsys):
    import bench_decode

    monkeypatch.setattr(sys, "argv", ["bench_decode.py", "--quick", "--output", str(tmp_path)])
    bench_decode.main()
    assert "dynamic cache: 6 layers of 64" in capsys.readouterr().out
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["context"], row["cache"]) for row in rows] == [
        (context, kind) for context in (64, 256) for kind in ("dynamic", "static")
    ]
    for row in rows:
        held = row["context"] + (160 if row["cache"] == "static" else 0)
        per_layer = 2 * held * 2 * 16 * 4  # two heads of 16 features, fp32
        assert row["bytes"] == {"GQA": 6 * per_layer, "CLA2": 3 * per_layer, "CLA3": 2 * per_layer}
        assert row["speedup"]["GQA"] == 1
        assert all(len(times) >= 3 for times in row["seconds"].values())


def test_benchmark_takes_quotients_within_a_turn(monkeypatch):
    import bench_decode

    times = {"GQA": [4.0, 8.0, 6.0], "CLA2": [2.0, 4.0, 60.0], "CLA3": [1.0, 2.0, 2.0]}
    monkeypatch.setattr(bench_decode, "take_turns", lambda *_: times)
    monkeypatch.setattr(bench_decode, "filled_cache", lambda *_: None)
    monkeypatch.setattr(bench_decode, "stored_bytes", lambda _: 0)
    row = bench_decode.measure(bench_decode.QUICK, dict.fromkeys(times), "dynamic", 64)
    assert row["speedup"] == {"GQA": 1, "CLA2": 2, "CLA3": 4}
    assert row["tokens_per_second"] == {"GQA": 1 / 6, "CLA2": 1 / 4, "CLA3": 1 / 2}


def test_comparison(monkeypatch, tmp_path, capsys):
    import compare

    command = ["compare.py", "--quick", "--workers", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    assert "MQA + CLA2" in capsys.readouterr().out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 3 * (2 + 1)
    assert all(4 < run["loss"] < 6.5 for run in runs)
    mqa, half, cla = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert mqa["bytes"] == 2 * 2 * 32 * 2
    assert half["bytes"] == cla["bytes"] == mqa["bytes"] / 2
    # A consumer lacks two projections to one head; two norms of keys and values come with CLA.
    assert mqa["parameters"] - cla["parameters"] == 2 * 32 * 32 - 32


def test_uptraining(monkeypatch, tmp_path, capsys):
    import uptrain

    monkeypatch.setattr(sys, "argv", ["uptrain.py", "--quick", "--output", str(tmp_path)])
    uptrain.main()
    assert "20% of 20 steps" in capsys.readouterr().out
    rows = json.loads((tmp_path / "uptrain.json").read_text())["rows"]
    losses = {(row["start"], row["fraction"]): row["loss"] for row in rows}
    assert len(rows) == len(losses) == 9
    assert len(set(losses.values())) == 9
    for start in uptrain.STARTS:
        assert losses[start, 0.2] < losses[start, 0.0]
    assert min(losses["first", 0.0], losses["mean", 0.0]) > losses["stock", 0.0]


def test_resume_trains_only_what_is_missing(tmp_path):
    from arms import QUICK
    from compare import Runs

    class Pool:
        """Trains at once, and by counting."""

        def submit(self, train, settings, arm, rate, seed, tokens):
            asked.append((arm, rate, seed))
            future = Future()
            run = {"arm": arm, "rate": rate, "seed": seed}
            future.set_result(run | {"loss": float(len(asked)), "parameters": 7})
            return future

    asked = []
    path, jobs = tmp_path / "runs.jsonl", [("MQA", 1e-3, 0), ("MQA", 1e-3, 1), ("MQA", 2e-3, 1)]
    first = Runs(QUICK, tmp_path, path, resume=False).of(jobs[:2], Pool())
    assert sorted(run["loss"] for run in first) == [1.0, 2.0]
    again = Runs(QUICK, tmp_path, path, resume=True).of(jobs, Pool())
    assert asked == jobs
    assert sorted(run["loss"] for run in again) == [1.0, 2.0, 3.0]
    other = Runs(replace(QUICK, steps=5), tmp_path, path, resume=True).of(jobs[:1], Pool())
    assert asked == [*jobs, jobs[0]]
    assert sorted(run["loss"] for run in other) == [4.0]


def test_learning_rate_comes_from_the_grid_and_the_loss_from_fresh_seeds():
    import compare
    from arms import QUICK

    settings = replace(QUICK, learning_rates=(1.0, 2.0, 3.0), seeds=(1, 2))
    runs = [
        {"arm": arm, "rate": rate, "seed": 0, "loss": abs(rate - best), "parameters": 7}
        for arm, best in zip(compare.ARMS, (2.0, 1.0, 2.0), strict=True)
        for rate in settings.learning_rates
    ]
    runs += [
        {"arm": arm, "rate": 2.0, "seed": seed, "loss": loss + seed, "parameters": 7}
        for arm, loss in zip(compare.ARMS, (5.0, 7.0, 6.0), strict=True)
        for seed in settings.seeds
    ]
    rows = compare.summarise(settings, runs)
    assert [row["rate"] for row in rows] == [2.0, 1.0, 2.0]
    assert [row["at_the_edge"] for row in rows] == [False, True, False]
    assert [row["losses"] for row in rows] == [[6.0, 7.0], [8.0, 9.0], [7.0, 8.0]]
    assert [row["difference"] for row in rows] == [[0, 0], [2, 2], [1, 1]]


def test_schedule():
    from arms import QUICK, schedule

    settings = replace(QUICK, steps=100)
    rates = [schedule(step, settings) for step in range(100)]
    assert rates[0] == 0.2
    assert max(rates) == rates[4] == rates[5] == 1
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
