"""The launch script of the Cross-Layer Attention example, through Megatron's own parser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = (
    Path(__file__).resolve().parents[2] / "examples" / "cross_layer_attention" / "pretrain_3b.sh"
)
PATHS = {
    "MEGATRON_LM": "/opt/Megatron-LM",
    "DATA_PATH": "/data/corpus",
    "TOKENIZER": "/data/tokenizer",
    "CHECKPOINTS": "/checkpoints",
}


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
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


def test_the_baseline_differs_by_the_feature_and_its_learning_rate() -> None:
    shared, baseline = arguments_of(LR="1e-3"), arguments_of(LR="1e-3", FACTOR="1")
    flags = ["--cla-sharing-factor", "2", "--cla-kv-norm", "separate"]
    at = shared.index(flags[0])
    assert shared[at : at + 4] == flags
    assert shared[:at] + shared[at + 4 :] == baseline
    for factor, rate, least in (("2", "2.25e-3", "0.000225"), ("1", "6.75e-4", "6.75e-05")):
        words = arguments_of(FACTOR=factor)
        assert words[words.index("--lr") + 1] == rate
        assert words[words.index("--min-lr") + 1] == least


def test_more_arguments_come_last() -> None:
    assert arguments_of("--train-iters", "7")[-2:] == ["--train-iters", "7"]


@pytest.mark.parametrize("missing", PATHS)
def test_it_names_what_is_unset(missing: str) -> None:
    result = script(**{key: value for key, value in PATHS.items() if key != missing})
    assert result.returncode != 0
    assert f"{missing}: " in result.stderr


@pytest.mark.parametrize("factor", ["1", "2", "3"])
def test_megatron_accepts_it(factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0 of 8. Missing here: the device's generation, and TransformerEngine, without which
    the configuration refuses the fused RoPE."""
    import torch
    from megatron.training import arguments

    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: hopper)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *arguments_of(FACTOR=factor)])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = arguments.parse_args()
    arguments.validate_args(args)
    assert args.train_iters * args.global_batch_size * args.seq_length == pytest.approx(1e11, 1e-4)
    args.apply_rope_fusion = False
    config = arguments.core_transformer_config_from_args(args)
    active = getattr(config, "megatron_plugins", {})
    assert list(active) == ([] if factor == "1" else ["cross_layer_attention"])
    if active:
        producers = set(active["cross_layer_attention"].resolve(32))
        assert len(producers) == {"2": 16, "3": 11}[factor]
