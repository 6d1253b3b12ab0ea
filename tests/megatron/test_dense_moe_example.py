"""The DS-MoE example: its comparison in small, its export, its launch script, its JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepspeed_plugins.features import features_of
from torch_plugins.config import DenseMoE

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "dense_moe"
ARMS = ["dense", "dense, narrow", "stock MoE", "DS-MoE", "DS-MoE, no MI loss", "DS-MoE + heads"]
PATHS = {
    "MEGATRON_LM": "/opt/Megatron-LM",
    "DATA_PATH": "/data/corpus",
    "TOKENIZER": "/data/tokenizer",
    "CHECKPOINTS": "/checkpoints",
}


def compare(folder: Path, *more: str) -> str:
    command = [sys.executable, str(EXAMPLE / "compare.py"), "--quick", "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [*command, *more], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole comparison of toys."""
    folder = tmp_path_factory.mktemp("compare")
    compare(folder, "--workers", "2")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


def test_arms_have_equal_parameters(result: dict[str, Any]) -> None:
    """But for routers; and the narrow one has those that are active."""
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ARMS
    wide = {row["mlp"] for arm, row in rows.items() if arm != "dense, narrow"}
    assert len(wide) == 1
    for arm in ARMS[2:]:
        assert 1 < rows[arm]["layers"] / rows["dense"]["layers"] < 1.05
    settings = result["settings"]
    share = settings["kept"] / settings["experts"]
    assert rows["dense, narrow"]["mlp"] == share * rows["dense"]["mlp"]


def test_the_sweep(result: dict[str, Any]) -> None:
    """All experts under every K and threshold; fewer cost what they should."""
    experts, dense = result["settings"]["experts"], result["rows"][0]
    for row in result["rows"][2:]:
        points = {(p["rule"], p["value"]): p for p in row["points"]}
        assert [points["top-k", k]["share"] for k in range(1, experts + 1)] == pytest.approx(
            [k / experts for k in range(1, experts + 1)]
        )
        active = points["top-k", 1]["active"]
        assert row["layers"] - active == row["mlp"] * (experts - 1) / experts
        assert points["top-k", experts]["active"] == row["layers"]
        losses = [loss for point in points.values() for loss in point["losses"]]
        assert all(0 < loss < 7 for loss in losses)
        assert points["top-k", 1]["losses"] != points["top-k", experts]["losses"]
        if row["arm"] == "stock MoE":
            continue
        # So few steps leave scores near 1 / N: every threshold keeps all.
        assert points["threshold", 0.1]["losses"] == pytest.approx(
            points["top-k", experts]["losses"], abs=1e-5
        )
    assert len(dense["points"]) == 1
    with_loss, without = (row["points"][0]["losses"] for row in result["rows"][3:5])
    assert with_loss != without, "the MI loss did nothing"


def test_resuming_trains_what_is_missing(folder: Path, result: dict[str, Any]) -> None:
    path = folder / "runs.jsonl"
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"stock MoE"' in line and '"seed": 1' in line)
    path.write_text("\n".join(lines[:at] + lines[at + 1 :]) + "\n")
    printed = compare(folder, "--workers", "1", "--resume")
    trained = re.findall(r"^(.*): lr .* seed (\d)", printed, re.MULTILINE)
    assert trained == [("stock MoE", "1")]
    assert json.loads((folder / "compare.json").read_text())["rows"] == result["rows"]
    assert (folder / "compare.png").stat().st_size > 10_000


def test_the_commands_behind_the_heat_map(folder: Path) -> None:
    """In one process: what README says to do with the checkpoint."""
    code = f"""
from pathlib import Path
from megatron_plugins.export.run import export
from torch_plugins.dense_moe_cli import main
folder = Path({str(folder)!r})
print(export(folder / "checkpoint", folder / "hf", folder / "data" / "tokenizer"))
main(["utilization", str(folder / "hf"), "--text", {__file__!r}, "--tokens", "256",
      "--sequence-length", "32", "--output", str(folder / "utilization.png"), "--json"])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    exported, told = result.stdout.split("\n", 1)
    assert "plugin_decoder" in exported
    assert [row["layer"] for row in json.loads(told)["routers"]] == [0, 1]
    assert (folder / "utilization.png").exists()


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLE / "pretrain_1b.sh"), *arguments],
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


def test_the_dense_twin_differs_by_the_feature() -> None:
    ours, twin = arguments_of(), arguments_of(DENSE="1")
    flags = ["--dsmoe-preset", "1b", "--dsmoe-inference", "threshold"]
    at = ours.index(flags[0])
    assert ours[at : at + 4] == flags
    assert ours[:at] + ours[at + 4 :] == twin
    assert arguments_of("--train-iters", "7")[-2:] == ["--train-iters", "7"]


@pytest.mark.parametrize("missing", PATHS)
def test_the_script_names_what_is_unset(missing: str) -> None:
    result = script(**{key: value for key, value in PATHS.items() if key != missing})
    assert result.returncode != 0
    assert f"{missing}: " in result.stderr


@pytest.mark.parametrize("dense", ["0", "1"])
def test_megatron_accepts_the_script(dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0 of 8. Missing here: the device's generation, and TransformerEngine, without which
    the configuration refuses the fused RoPE."""
    import torch
    from megatron.training import arguments

    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: hopper)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *arguments_of(DENSE=dense)])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = arguments.parse_args()
    arguments.validate_args(args)
    tokens = args.global_batch_size * args.seq_length
    assert args.train_iters * tokens == pytest.approx(3e10, 1e-4)
    assert args.lr_warmup_iters * tokens == pytest.approx(1e9, 1e-3)
    sizes = (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads)
    assert sizes == (24, 2048, 8192, 32)
    assert (args.num_query_groups, args.kv_channels, args.swiglu) == (2, 64, False)
    args.apply_rope_fusion = False
    config = arguments.core_transformer_config_from_args(args)
    features = getattr(config, "megatron_plugins", {})
    assert list(features) == ([] if dense == "1" else ["dense_moe"])
    if features:
        ours: DenseMoE = features["dense_moe"]
        assert (ours.num_experts, ours.attention_experts, ours.router_hidden_size) == (32, 16, 512)
        assert (ours.mi_weight_mlp, ours.mi_weight_attention) == (6.3e-4, 3.5e-4)
        assert ours.kept() == (None, 0.48)
        assert ours.kept(attention=True) is None


def test_the_json_is_read() -> None:
    """tests/deepspeed/test_examples.py trains with it."""
    features = features_of(json.loads((EXAMPLE / "ds_config.json").read_text()))
    assert list(features) == ["dense_moe"]
    assert features["dense_moe"].num_experts == 8
