"""``examples/dense_moe/bench_sparse.py`` with a toy layer, and its arithmetic."""

import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "dense_moe"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    threads = torch.get_num_threads()
    import bench_sparse

    yield bench_sparse
    torch.set_num_threads(threads)


def test_benchmark(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "out" / "sparse.json"
    monkeypatch.setattr(sys, "argv", ["bench_sparse.py", "--quick", "--json", str(path)])
    bench.main()
    assert "8 SwiGLU experts of width 8" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], row["phase"], row["tokens"]) for row in rows] == [
        (dtype, phase, tokens)
        for dtype in ("fp32", "bf16")
        for phase, tokens in (("decode", 1), ("decode", 3), ("prefill", 40))
    ]
    for row in rows:
        assert row["speedup"]["dense"] == 1
        assert 2 / 8 <= row["touched"] <= min(1, row["tokens"] * 2 / 8)
        assert all(len(times) >= 3 for times in row["seconds"].values())


def test_quotients_are_taken_within_a_turn(bench, monkeypatch):
    times = {"dense": [4.0, 8.0, 6.0], "sparse": [2.0, 4.0, 60.0]}
    times |= {"eager": [1.0, 2.0, 2.0], "grouped_mm": [4.0, 4.0, 4.0]}
    monkeypatch.setattr(bench, "take_turns", lambda *_: times)
    with torch.inference_mode():
        layer = bench.Layer.draw(bench.QUICK, torch.float32)
        row = bench.measure(bench.QUICK, layer, 12, 2)
    assert row["speedup"] == {"dense": 1, "sparse": 2, "eager": 4, "grouped_mm": 1.5}
    assert row["tokens_per_second"] == {"dense": 2, "sparse": 3, "eager": 6, "grouped_mm": 3}


def test_an_arm_that_computes_something_else_is_not_timed(bench, monkeypatch):
    monkeypatch.setattr(bench, "sparse_mlp", lambda x, *_: x)
    with torch.inference_mode(), pytest.raises(AssertionError, match="not close"):
        bench.measure(bench.QUICK, bench.Layer.draw(bench.QUICK, torch.float32), 12, 2)
