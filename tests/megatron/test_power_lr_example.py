"""The Power LR launch script, through Megatron's parser, validation and scheduler."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.training import arguments, global_vars, training

from tests.megatron.power_run import reset
from torch_plugins.config import PowerLR, PowerMup

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "power_lr" / "pretrain_power.sh"
PATHS = {
    "MEGATRON_LM": "/opt/Megatron-LM",
    "DATA_PATH": "/data/corpus",
    "TOKENIZER": "/data/tokenizer",
    "CHECKPOINTS": "/checkpoints",
}


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize("missing", [*PATHS, "MASTER_ADDR", "NODE_RANK"])
def test_the_script_names_what_is_unset(missing: str) -> None:
    given = {**PATHS, "NNODES": "2", "MASTER_ADDR": "node0"}
    result = script(**{key: value for key, value in given.items() if key != missing})
    assert result.returncode != 0
    assert missing in result.stderr


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of 8 GPUs, which are not here."""
    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: hopper)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    yield
    reset()


@pytest.mark.usefixtures("one_node")
def test_the_script_is_the_papers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    result = script("--log-interval", "7", **PATHS, DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *result.stdout.splitlines()])
    args = arguments.parse_args()
    arguments.validate_args(args)
    assert args.log_interval == 7
    assert args.data_parallel_size == 8
    args.apply_rope_fusion = False  # it needs TransformerEngine
    config = arguments.core_transformer_config_from_args(args)
    features = config.megatron_plugins
    assert features[PowerLR.key()] == PowerLR(decay_tokens=250 * 10**9)
    assert features[PowerMup.key()] == PowerMup("powerlm-3b")
    assert config.mup_width_mult == 9

    reset()
    global_vars.set_global_variables(args, build_tokenizer=False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    scheduler = training.get_optimizer_param_scheduler(optimizer)
    papers = {5e8: 0.01, 1e9: 0.02, 1e11: 1.00545e-2, 1e12: 3.10713e-3, 1.25e12: 0.0}
    for tokens, rate in papers.items():
        scheduler.step(round(tokens / 4096) - scheduler.num_steps)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=5e-6, abs=1e-10)
