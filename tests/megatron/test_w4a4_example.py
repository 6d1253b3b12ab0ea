"""The W4A4 example: its experiment in small, its launch script, its JSON."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepspeed_plugins.features import features_of
from torch_plugins.config import W4A4

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "w4a4"
ARMS = {
    "baseline": None,
    "inputs": W4A4(kurtosis_weight=0, start_iteration=1000),
    "outputs": W4A4(activation_bits=0, kurtosis_weight=1e-5),
    "both": W4A4(kurtosis_weight=1e-5, start_iteration=1000),
}
PATHS = {
    "MEGATRON_LM": "/opt/Megatron-LM",
    "DATA_PATH": "/data/corpus",
    "TOKENIZER": "/data/tokenizer",
    "CHECKPOINTS": "/checkpoints",
}


def experiment(folder: Path, *more: str) -> str:
    """What a small experiment prints, in this process and on one thread."""
    import torch

    printed, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(EXAMPLE))
        words = ["experiment.py", "--quick", "--output", str(folder), *more]
        patch.setattr(sys, "argv", words)
        import experiment

        experiment.main()
    torch.set_num_threads(threads)
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole experiment with toys."""
    folder = tmp_path_factory.mktemp("experiment")
    printed = experiment(folder)
    assert "planted: 2 layers of 32, 15,360 tokens, 1 seed" in printed
    assert printed.count("step 50 of 60") == 4
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "experiment.json").read_text())


def test_every_arm_is_quantized_in_every_way(result: dict[str, Any]) -> None:
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == list(ARMS)
    equal_odds = result["settings"]["vocab_size"]
    for arm, row in rows.items():
        found = {name: values[0] for name, values in row["perplexities"].items()}
        assert len(found) == 8
        assert all(1 < value < equal_odds / 2 for value in found.values())
        assert len(set(found.values())) == 8, "a quantization did nothing"
        learned = arm in ("inputs", "both")
        assert (row["percentiles"][0] is None) == learned
        assert [point["step"] for point in row["inputs"]] == [0, 30, 60]
        for group in row["groups"].values():
            assert all(math.isfinite(value) for value in group[0].values())
            assert 0.002 < group[0]["error"] < 0.05


def test_only_the_kurtosis_removes_planted_channels(result: dict[str, Any]) -> None:
    """Layers that read the residual stream: the largest channel over the median."""
    ratios = {row["arm"]: row["groups"]["q to up"][0] for row in result["rows"]}
    assert len({of["start"] for of in ratios.values()}) == 1, "arms begin alike"
    assert ratios["baseline"]["start"] > 5
    for arm, of in ratios.items():
        if arm in ("outputs", "both"):
            assert of["end"] < 0.6 * of["start"], arm
        else:
            assert of["end"] > 0.8 * of["start"], arm


def test_resuming_trains_what_is_missing(folder: Path, result: dict[str, Any]) -> None:
    path = folder / "runs.jsonl"
    lines = path.read_text().splitlines()
    [kept] = [line for line in lines if '"baseline"' in line]
    path.write_text("\n".join([line for line in lines if line != kept]) + "\n")
    printed = experiment(folder, "--resume")
    assert re.findall(r"^run .*: (.*)$", printed, re.MULTILINE) == ["planted, baseline, seed 1"]
    assert json.loads((folder / "experiment.json").read_text())["rows"] == result["rows"]
    for picture in ("outliers.png", "perplexity.png"):
        assert (folder / picture).stat().st_size > 10_000


def test_the_model_is_quantized_with_the_clips_it_learned(folder: Path) -> None:
    """By the command that README has."""
    command = [sys.executable, "-m", "torch_plugins.w4a4", "quantize", "model", "w4a4"]
    command += ["--activations", "learned", "--calibration", __file__, "--tokens", "1024"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "layer 2 of 2: 7 linear layers quantized" in result.stderr
    section = json.loads((folder / "w4a4" / "config.json").read_text())["quantization_config"]
    assert section["format"] == "pack-quantized"


def test_the_largest_weight_that_costs_little_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from experiment import chosen
    from experiment_arms import Settings

    losses = {1e-5: 50.0, 1e-4: 50.4, 1e-3: 50.6}
    found = {weight: {"perplexities": {"RTN, static": loss}} for weight, loss in losses.items()}
    assert chosen(found, Settings()) == 1e-4
    assert chosen({}, Settings(weights=(7.0,))) == 7


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLE / "pretrain_megatron.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def arguments_of(*arguments: str, **environment: str) -> list[str]:
    result = script(*arguments, **PATHS, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_arms_differ_by_the_feature() -> None:
    baseline, both = arguments_of(ARM="baseline"), arguments_of()
    at = both.index("--w4a4")
    assert both[:at] + both[at + 7 :] == baseline
    assert not [word for word in baseline if "w4a4" in word]
    assert arguments_of("--train-iters", "7")[-2:] == ["--train-iters", "7"]
    wrong = script(**PATHS, ARM="neither")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "ARM=neither: must be baseline, inputs, outputs or both" in wrong.stderr


@pytest.mark.parametrize("missing", PATHS)
def test_the_script_names_what_is_unset(missing: str) -> None:
    result = script(**{key: value for key, value in PATHS.items() if key != missing})
    assert result.returncode != 0
    assert f"{missing}: " in result.stderr


@pytest.mark.parametrize("arm", ARMS)
def test_megatron_accepts_the_script(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0 of 8. Missing here: the device's generation, and TransformerEngine, without which
    the configuration refuses the fused RoPE."""
    import torch
    from megatron.training import arguments

    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: hopper)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *arguments_of(ARM=arm)])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = arguments.parse_args()
    arguments.validate_args(args)
    assert args.train_iters * args.global_batch_size * args.seq_length == pytest.approx(2e10, 1e-4)
    args.apply_rope_fusion = False
    config = arguments.core_transformer_config_from_args(args)
    features = getattr(config, "megatron_plugins", {})
    assert features == ({} if ARMS[arm] is None else {"w4a4": ARMS[arm]})


def test_the_json_is_read() -> None:
    features = features_of(json.loads((EXAMPLE / "ds_config.json").read_text()))
    assert features == {"w4a4": W4A4(kurtosis_weight=1e-5)}
