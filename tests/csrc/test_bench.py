"""``examples/native_ops/bench.py``: a small run of it, its arithmetic, and what it leaves out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "native_ops"
NAMES = {path.stem for path in EXAMPLE.glob("*.py")}


@pytest.fixture
def bench(monkeypatch):
    """Its modules can be imported; those of other examples have the same names."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    others = {name: sys.modules.pop(name) for name in NAMES & set(sys.modules)}
    yield
    for name in NAMES & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


def test_small_run(tmp_path):
    arguments = "--quick --peers eager --seconds 0.01 --shapes 256x128 --tokens 1 3 --cold".split()
    arguments += "--moe-shapes 64x32x4x2 --moe-tokens 3 --elements 8192 --rows 2 --plot".split()
    command = [sys.executable, EXAMPLE / "bench.py", *arguments, "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Goals of linear: 1 thread, ms of CPU time" in done.stdout
    assert (tmp_path / "out/bench.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "out/bench.json").read_text())
    (run,) = result["runs"]
    assert run["wrong"] == []
    assert [(row["operator"], row["tokens"]) for row in run["rows"]] == [
        ("linear", 1),
        ("linear", 3),
        ("sparse MoE", 3),
        ("fake-quant + kurtosis", 2),
        ("fake-quant + kurtosis", 2),
        ("add + RMSNorm", 2),
    ]
    assert {"bf16", "torch int8 onednn"} <= set(run["rows"][0]["arms"])
    assert all(len(arm["cpu"]) >= 3 for row in run["rows"] for arm in row["arms"].values())
    native = run["versions"]["native"].startswith("active")
    assert native == ("W4A4" in run["rows"][0]["arms"])
    for goal in result["goals"]:
        assert goal["reached"] == (goal["ratio"][0] >= goal["at_least"])


def row(medians):
    """A row of the linear layer with one token; ours at the limit would take 1 s."""
    arms = {
        name: {
            "median": seconds,
            "cpu": [seconds, 2 * seconds],
            "wall": [0.0, 0.0],
            "floor": 1.0,
        }
        for name, seconds in medians.items()
    }
    what = {"operator": "linear", "shape": [256, 128], "state": "warm", "tokens": 1}
    return {**what, "threads": 1, "clock": "cpu", "arms": arms}


def test_goals_are_compared_with_the_fastest_peer(bench):
    from goals import verdicts

    found = verdicts([row({"W4A4": 2.0, "bf16": 12.0, "ggml Q4_0": 4.0, "torchao W4A8": 3.0})])
    assert [(v.peer, v.ratio[0], v.ceiling) for v in found] == [
        ("torchao W4A8", 1.5, 3.0),
        ("bf16", 6.0, 12.0),
    ]
    assert [v.word for v in found] == ["reached", "reached"]
    (other,) = verdicts([row({"W4A4": 2.0, "bf16": 8.0})])
    assert (other.word, other.ratio[0]) == ("not reached", 4.0)
    (beyond,) = verdicts([row({"W4A4": 2.0, "bf16": 4.0})])
    assert beyond.word == "not reached (beyond the limit)"
    assert verdicts([row({"bf16": 4.0, "ggml Q4_0": 4.0})]) == []


def test_rows_without_ours_or_what_they_are_compared_with_are_shown(bench, capsys):
    from progress import Progress
    from rich.console import Console
    from table import of_arms, of_goals

    for arms in ({"ggml Q4_0": 4.0}, {"W4A4": 2.0}, {"bf16": 1.0}):
        shown = row({name: seconds / 1000 for name, seconds in arms.items()})
        shown["arms"] = {n: {**a, "scheme": "", "error": None} for n, a in shown["arms"].items()}
        Progress(1).row(shown)
        Console().print(of_arms([shown]), of_goals("linear", [shown]))
    output = capsys.readouterr().out
    assert "ggml Q4_0 4.00 ms" in output
    assert "none of ours was measured" in output


def test_ratios_are_taken_within_a_round(bench):
    from timing import ratio

    assert ratio([4.0, 8.0, 60.0], [2.0, 10.0, 10.0]) == (2.0, 1.4, 4.0)


def test_arms_take_turns(bench):
    from timing import Effort, take_turns

    order = []
    calls = {name: lambda number, name=name: order.append((name, number)) for name in "abc"}
    times = take_turns(calls, Effort(0.0, sample=0.0, fewest=4, most=4), 1)
    assert all(len(of["cpu"]) == len(of["wall"]) == 4 for of in times.values())
    for name in "abc":  # every copy has its turn
        assert [number for arm, number in order if arm == name] == list(range(11))
    rounds = order[9:]
    firsts = [rounds[6 * turn][0] for turn in range(4)]
    assert firsts == ["a", "b", "c", "a"]


def test_shapes_are_checked(bench):
    from settings import numbers

    assert numbers("64x32", 2) == (64, 32)
    for shape in ("64", "64x0", "64x32x2", "64xa"):
        with pytest.raises(SystemExit, match=rf"{shape}: must be 2 numbers"):
            numbers(shape, 2)


def test_limits_of_what_fits_the_cache(bench):
    from limits import Limits

    limits = Limits(1, 1000, dram=10.0, l3=100.0, int8=50.0)
    assert limits.floor(500, 100, "int8") == 5.0
    assert limits.floor(500, 300, "int8") == 6.0
    assert limits.floor(500, 100, "int8", cold=True) == 50.0
    assert limits.floor(500, copied=True) is None
    assert limits.floor(2000) == 200.0
    assert limits.floor(500, 100, "bf16") is None
    assert Limits(1).floor(500) is None


def test_without_a_compiler_there_are_no_limits(bench, monkeypatch):
    import limits

    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    found = limits.measure(1, 2**20)
    assert found.dram is found.int8 is None
    assert set(found.names.values()) == {"there is no C compiler"}


def linear_rows(peers, told):
    import linear
    from limits import Limits
    from timing import Effort

    effort = Effort(0.0, sample=0.0, fewest=3, most=3)
    tokens = {"warm": (1,), "cold": (2,)}
    return list(linear.rows(peers, [(256, 64)], tokens, effort, Limits(1, 20_000), told.append))


def test_cold_weights_are_copies_that_take_turns(bench):
    from names import BF16
    from peers import Peer

    used = []

    def prepare(weight, threads):
        number = len(used)
        used.append(0)

        def forward(x):
            used[number] += 1
            return x.float() @ weight.fp32.T

        return forward

    rows = linear_rows([Peer(BF16, "bf16", 16, prepare)], [])
    assert [(r["state"], r["tokens"]) for r in rows] == [("warm", 1), ("cold", 2)]
    _, *copies = used
    assert len(copies) == 3  # of 32 KiB: three times the cache, and one more
    assert max(copies) - min(copies) <= 1


def test_what_is_wrong_or_missing_is_told_and_not_timed(bench):
    from arms import Unavailable
    from names import BF16
    from peers import Peer

    def missing(weight, threads):
        raise Unavailable("not installed")

    def scaled(by):
        return lambda weight, threads: lambda x: by * (x.float() @ weight.fp32.T)

    told = []
    peers = [
        Peer("W4A4", "W4A4", 4, scaled(1)),  # without the rounding to four bits
        Peer(BF16, "bf16", 16, scaled(1)),
        Peer("half", "bf16", 16, scaled(0.5)),
        Peer("absent", "bf16", 16, missing),
    ]
    with torch.inference_mode():
        rows = linear_rows(peers, told)
    assert [set(r["arms"]) for r in rows] == [{BF16}, {BF16}]
    kept = [words for words in told if words[:2] in ("- ", "! ")]
    assert kept[0] == "- absent: not installed"
    assert kept[1].startswith("! W4A4: Wrong: W4A4 of 256 x 64, 1 tokens: error 0.")
    assert kept[2] == "- half: its output is wrong, with an error of 0.50"


def test_wrong_experts_are_not_timed(bench):
    import moe
    from experts import Experts, reference
    from limits import Limits
    from names import EAGER_EXPERTS, MOE_BF16, MOE_INT4

    shape = (64, 32, 4, 2)
    experts, draws, told = Experts.draw(shape), [moe.draw(shape, 3, 0)], []
    right = {EAGER_EXPERTS: lambda of: of.x, MOE_INT4: lambda of: reference(experts, of)}
    wrong = {MOE_BF16: right[MOE_INT4], "other": lambda of: 2 * of.x}
    with torch.inference_mode():
        arms = moe.arms_of({**right, **wrong}, draws, shape, experts, Limits(1), told.append)
    assert set(arms) == set(right)
    assert [words.partition(":")[0] for words in told] == ["! native bf16", "- other"]


def test_wrong_fused_operators_are_not_timed(bench):
    import fused
    from names import EAGER, FUSED

    told = []
    calls = {EAGER: lambda: (torch.ones(3),), FUSED: lambda: (torch.zeros(3),)}
    assert set(fused.checked(calls, EAGER, None, 0.01, told.append)) == {EAGER}
    assert told[0].startswith("! native: Wrong: ")
