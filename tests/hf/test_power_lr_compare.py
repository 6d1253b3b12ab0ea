"""The Power LR experiment: its arms, its data, its bookkeeping, and a small run of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "power_lr"


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_arms():
    """One warm-up, one end; only Power's rate knows the batch size, and not the horizon."""
    from compare_settings import ARMS, FULL, Run

    assert FULL.cells == [(2**16, 4), (2**16, 16), (2**20, 4), (2**20, 16)]
    assert [FULL.label(cell) for cell in FULL.cells] == ["T, B", "T, 4B", "16T, B", "16T, 4B"]
    assert [len(FULL.grid(arm)) for arm in ARMS] == [6, 1, 6, 6]

    def rates(arm, cell):
        tokens = torch.tensor([*range(0, cell[0], FULL.warmup_tokens), cell[0]])
        values = FULL.grid(arm)[0]
        return Run(arm, values, *cell, 1).schedule(FULL).rate(tokens, cell[1] * 128)

    for arm in ARMS:
        curves = [rates(arm, cell) for cell in FULL.cells]
        assert all(curve[0] == curve[-1] == 0 for curve in curves)
        assert [int(curve.argmax()) for curve in curves] == [1] * 4
        batch_ratio, horizon_ratio = curves[1][5] / curves[0][5], curves[2][5] / curves[0][5]
        assert (batch_ratio > 1) == (arm in ("power", "published"))
        assert (horizon_ratio == 1) == (arm != "cosine")


def test_a_seed_has_one_order_of_the_data():
    from compare_settings import Run
    from compare_training import batches

    data = torch.arange(600).view(100, 6)

    def seen(tokens, batch_size, seed=1):
        return torch.cat(list(batches(data, Run("power", (4, 0.02), tokens, batch_size, seed))))

    short = seen(120, 2)
    assert len(short) == 20
    assert torch.equal(short, seen(120, 4))
    assert torch.equal(short, seen(480, 4)[:20])
    assert not torch.equal(short, seen(120, 2, seed=2))


def test_sequences_are_the_corpus(tmp_path):
    from compare_training import sequences

    path = tmp_path / "train.bin"
    torch.arange(60_000, 60_011).to(torch.uint16).numpy().tofile(path)
    assert sequences(path, 4).tolist() == [[*range(60_000, 60_004)], [*range(60_004, 60_008)]]


def test_scheduler_follows_the_arm():
    from compare_settings import ARMS, QUICK, Run
    from compare_training import build_scheduler

    for arm in ARMS:
        run = Run(arm, QUICK.grid(arm)[0], 4096, 2, 1)
        schedule = run.schedule(QUICK)
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=schedule.max_lr)
        scheduler = build_scheduler(optimizer, run, QUICK)
        for step in range(64):
            assert scheduler.get_last_lr() == [float(schedule.rate(step * 64, 64))]
            optimizer.step()
            scheduler.step()
        assert scheduler.get_last_lr() == [0]


def test_choice_and_resume(tmp_path):
    from compare_results import Results
    from compare_settings import ARMS, QUICK, Run
    from compare_training import Outcome

    grids = {"amplitudes": (4, 8, 16), "max_lrs": (0.1,), "peaks": (0.1, 0.2, 0.3)}
    settings = replace(QUICK, seeds=(1, 2), **grids)
    path, identity = tmp_path / "results.json", {"corpus": "x", "seeds": (1, 2)}
    results = Results(path, identity, resume=True)
    # By the mean of the seeds, the middle is best for Power, and the last for cosine and WSD.
    grid_losses = {"power": [(3, 1), (1, 2), (9, float("inf"))], "published": [(4, 4)]}
    for arm in ARMS:
        pairs = grid_losses.get(arm, [(3, 3), (2, 2), (1, 1)])
        for values, losses in zip(settings.grid(arm), pairs, strict=True):
            for seed, loss in zip(settings.seeds, losses, strict=True):
                results.add(Run(arm, values, *settings.cells[0], seed), Outcome(loss, 0.5))
    assert [results.best(arm, settings) for arm in ARMS] == [(8, 0.1), (4, 0.02), (0.3,), (0.3,)]
    assert results.at_the_edge(settings) == ["cosine", "WSD"]
    assert results.seconds == 10

    assert Results(path, identity, resume=True).outcomes == results.outcomes
    assert Results(path, identity, resume=False).outcomes == {}
    assert Results(path, {**identity, "corpus": "y"}, resume=True).outcomes == {}


def test_small_run(tmp_path):
    """``compare.py --quick``: every step with a toy model."""
    command = [sys.executable, str(EXAMPLE / "compare.py"), "--quick", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "Tuning at T, B" in result.stdout
    assert "power - WSD" in result.stdout

    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 3 * (2 + 3) + 1 + 3
    losses = {str(entry["run"]): entry["outcome"]["loss"] for entry in runs}
    assert len(losses) == len(runs)
    assert all(2 < loss < 5.9 for loss in losses.values())  # ln(384) is 5.95
    power = [entry for entry in runs if entry["run"]["arm"] == "published"]
    by_cell = {(e["run"]["tokens"], e["run"]["batch_size"]): e["outcome"]["loss"] for e in power}
    assert len(set(by_cell.values())) == 4
    assert by_cell[16_384, 8] < by_cell[4096, 8] - 0.1
