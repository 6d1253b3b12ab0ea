"""The command on a checkpoint of the real training loop, with Megatron and without."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
from tests.megatron.harness import train
from tests.parity.conftest import GQA, LLAMA, TP2, Evil

WITHOUT_MEGATRON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from megatron_plugins.export_hf import main
status = main(sys.argv[1:])
import torch
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.partition(".")[0] == "megatron"]
sys.exit(status)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder model after two iterations in bf16 with the distributed optimizer."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    flags = LLAMA + TP2 + GQA + "--ladder-residual --ladder-layers 1-3 --bf16 --exit-interval 2"
    flags += " --use-distributed-optimizer --save-interval 2"
    train(*flags.split(), "--save", folder, processes=2)
    return folder


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120
    )


def test_against_megatron(trained: Path, tmp_path: Path) -> None:
    """Latest iteration, optimizer state left alone, no object of the checkpoint unpickled."""
    folder = find_iteration(trained)
    assert any(key.startswith("optimizer") for key in Checkpoint(folder).tensors)
    put_evil_objects(folder, tmp_path / "executed")
    done = command(
        *("-m", "megatron_plugins.export_hf", "--load", trained, "--output", tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    assert "logits equal: max abs difference" in done.stdout
    assert "against Megatron-Core" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "plugin_decoder"
    assert config["ladder_residual"] == {"layers": "1-3"}
    assert config["dtype"] == "bfloat16"
    assert not (tmp_path / "executed").exists()


def put_evil_objects(folder: Path, marker: Path) -> None:
    """Every ``_extra_state`` of the checkpoint becomes code."""
    torch.save(Evil(marker), folder / "evil.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    evil = _StorageInfo("evil.distcp", 0, (folder / "evil.distcp").stat().st_size)
    keys = [key for key in metadata.storage_data if "_extra_state" in key.fqn]
    assert keys
    metadata.storage_data |= dict.fromkeys(keys, evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_without_megatron(trained: Path, tmp_path: Path) -> None:
    """No Megatron, no process group, no CUDA."""
    done = command("-c", WITHOUT_MEGATRON, "--load", trained, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Megatron is not installed" in done.stderr
    assert "against the naive reference" in done.stdout


def test_help() -> None:
    done = command("-m", "megatron_plugins.export_hf", "--help")
    assert done.returncode == 0
    for flag in ("--load", "--output", "--tokenizer", "--iteration", "--dtype", "--force"):
        assert flag in done.stdout
