"""``python -m torch_plugins.power_lr``: the table, its JSON, the picture, and wrong options."""

import builtins
import json
import math
import subprocess
import sys

import pytest
import torch

from torch_plugins.power_lr import Schedule, cosine, wsd
from torch_plugins.power_lr_cli import main, plot, short, token_count
from torch_plugins.power_lr_cli import parser as build_parser

PAPER = ["--batch-size", "128", "1024", "--tokens", "0.5B", "100B", "1e12"]


@pytest.fixture
def missing(monkeypatch):
    """Make packages look as if they were not installed."""
    names = set()
    original = builtins.__import__

    def without(name, *rest, **keywords):
        if name.split(".")[0] in names:
            raise ImportError(f"No module named {name!r}")
        return original(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    return names


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_table(rich, missing, capsys):
    missing |= set() if rich else {"rich"}
    main(["table", *PAPER])
    text = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["500M", "0.00658021", "0.01"] in rows
    assert ["100B", "0.00125681", "0.0100545"] in rows
    assert ["1T", "0.000388392", "0.00310713"] in rows
    assert ["clip", "ends", "440.2M", "25.96B"] in rows
    assert ("┃" in text) == rich
    assert "a 4, b -0.51, max_lr 0.02, warm-up 1B tokens" in text


def test_table_for_machines(capsys):
    options = ["--total-tokens", "1.25T", "--decay-tokens", "250B", "--sequence-length", "2048"]
    main(["table", "--batch-size", "2048", "--tokens", "1T", "1.125T", *options, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["schedule"]["decay_tokens"] == 250 * 10**9
    assert printed["schedule"]["warmup_tokens"] == 10**9
    assert printed["clipped_until"] == {"2048": pytest.approx(25.964e9, rel=1e-4)}
    top = 3.10713e-3
    assert printed["rates"] == [
        {"tokens": 10**12, "batch_size": 2048, "lr": pytest.approx(top, rel=1e-5)},
        {"tokens": 1125 * 10**9, "batch_size": 2048, "lr": pytest.approx(0.377541 * top, rel=1e-5)},
    ]


def test_clip_that_never_ends(capsys):
    flat = ["--a", "100", "--b", "0", "--batch-size", "1"]
    main(["table", *flat, "--json"])
    assert json.loads(capsys.readouterr().out)["clipped_until"] == {"1": None}
    main(["table", *flat])
    assert "the end" in capsys.readouterr().out


def test_plot(tmp_path, capsys):
    path = tmp_path / "power.png"
    main(["plot", "--batch-size", "8", "--total-tokens", "1T", "250B", "2T", "--output", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"written: {path}\n"


def test_plot_draws_the_closed_forms(monkeypatch):
    drawn = []
    monkeypatch.setattr("torch_plugins.power_lr_cli.draw", lambda *given: drawn.append(given))
    plot(build_parser().parse_args(["plot", "--decay-fraction", "0.25", "--min-lr", "1e-4"]))
    [(curves, sizes, length, path)] = drawn
    assert (list(curves), sizes, length) == ([10**12, 250 * 10**9], [128, 512, 1024], 4096)
    assert path.name == "power_lr.png"
    batch, late = 1024 * 4096, 10**12
    assert float(curves[late]["power"].rate(75e10, batch)) == float(Schedule().rate(75e10, batch))
    assert float(curves[late]["WSD"].rate(75e10, batch)) == 0.01
    assert {float(s.rate(late, batch)) for s in curves[late].values()} == {1e-4}


def test_cosine_and_wsd():
    tokens = torch.tensor([0, 50, 100, 600, 1100, 1350, 1600, 9999])
    down = cosine(0.01, 1100, warmup_tokens=100, min_lr=0.002)
    expected = [0, 0.005, 0.01, 0.006, 0.002, 0.002, 0.002, 0.002]
    steady = wsd(0.01, 1600, 500, warmup_tokens=100, decay_style="linear")
    for batch in (1, 4096, 10**7):
        assert down.rate(tokens, batch).tolist() == pytest.approx(expected)
        assert steady.rate(tokens, batch).tolist() == pytest.approx(
            [0, 0.005, 0.01, 0.01, 0.01, 0.005, 0, 0]
        )


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("1e9", 10**9), ("1.5T", 1500 * 10**9), ("2k", 2000), ("3M", 3e6)],
)
def test_token_counts(text, count):
    assert token_count(text) == count
    assert token_count(short(count)) == count


def test_short_numbers():
    assert [short(n) for n in (999, 25.964e9, math.inf)] == ["999", "25.96B", "the end"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("table --tokens 5X", "argument --tokens: '5X': use a number like 4096, 1e9, 250B or 1.5T"),
        ("table --tokens=-5", "argument --tokens: '-5': use a number"),
        ("table --tokens nan", "argument --tokens: 'nan': use a number"),
        ("table --batch-size 0", "argument --batch-size: '0': use an integer of at least 1"),
        ("table --batch-size 1.5", "argument --batch-size: '1.5': use an integer"),
        ("table --a 0", "power_lr.a (--power-lr-a) 0.0: must be positive; the paper uses 4"),
        ("table --max-lr 0", "max_lr 0.0: must be positive; the paper uses 0.02"),
        ("table --decay-tokens 5", "decay_tokens 5: the last phase ends with the run: give total"),
        ("plot --total-tokens 1k", "do not fit into total_tokens 1000: shorten one"),
        ("plot --decay-fraction 1.5", "--decay-fraction 1.5: must lie between 0 and 1"),
        ("plot --peak-lr 0", "--peak-lr 0.0: must exceed --min-lr 0.0"),
        ("plot --output {}/missing/x.png", "/missing/x.png: [Errno 2] No such file"),
        ("plot --output {}/x.nonsense", "x.nonsense: Format 'nonsense' is not supported"),
        ("plot --json", "unrecognized arguments: --json"),
        ("", "the following arguments are required: command"),
    ],
)
def test_wrong_options(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(options.format(tmp_path).split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_plot_without_matplotlib(missing, capsys):
    missing.add("matplotlib")
    with pytest.raises(SystemExit):
        main(["plot"])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_as_a_module():
    command = [sys.executable, "-m", "torch_plugins.power_lr", "table", *PAPER, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(json.loads(result.stdout)["rates"]) == 6
