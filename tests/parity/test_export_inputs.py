"""What the exporter takes, and what it refuses by name before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer

from megatron_plugins import export_hf
from megatron_plugins.export import mapping
from megatron_plugins.export.arguments import REFUSED
from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
from megatron_plugins.export.mapping import HFTensors
from megatron_plugins.export.run import export
from tests.parity.conftest import Case, change_arguments

pytestmark = pytest.mark.usefixtures("without_megatron")


def refused(load: Path, tmp_path: Path, capsys: Any, *flags: str) -> str:
    """The message of a refused export, which leaves nothing."""
    status = export_hf.main(["--load", str(load), "--output", str(tmp_path / "out"), *flags])
    assert status == 2
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return str(capsys.readouterr().err)


VALUES: dict[str, dict[str, Any]] = {
    "--num-experts": {"num_experts": 8},
    "--heterogeneous-layers-config-path": {"heterogeneous_layers_config_encoded_json": "{}"},
    "--hybrid-layer-pattern": {"hybrid_layer_pattern": "M*-"},
    "--hybrid-override-pattern": {"hybrid_override_pattern": "M*-"},
    "--experimental-attention-variant": {"experimental_attention_variant": "dsa"},
    "--softmax-type": {"softmax_type": "learnable"},
    "--position-embedding-type": {"position_embedding_type": "yarn"},
    "--rotary-seq-len-interpolation-factor": {"rotary_seq_len_interpolation_factor": 4},
    "--rope-scaling-factor": {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
    "--use-te-activation-func": {"use_te_activation_func": True, "swiglu": False},
    "--window-size": {"window_size": [128, 0]},
    "--spec": {"spec": ["my_package.specs", "layer"]},
    "--yaml-cfg": {"yaml_cfg": "config.yaml"},
}
"""Flag -> arguments that make its row apply; any other row is a switch named like its flag."""


@pytest.mark.parametrize("flag", [row.flag for row in REFUSED])
def test_inexpressible(flag: str, checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    changes = VALUES.get(flag, {flag[2:].replace("-", "_"): True})
    change_arguments(checkpoint, **changes)
    assert f"  {flag}: " in refused(checkpoint, tmp_path, capsys)


def test_unknown_tensors(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    """Arguments that tell of other tensors than those there are."""
    change_arguments(checkpoint, num_layers=3, add_qkv_bias=True, kv_channels=32)
    message = refused(checkpoint, tmp_path, capsys)
    assert "decoder.layers.self_attention.linear_qkv.bias is missing" in message
    assert "decoder.layers.mlp.linear_fc2.weight is [4, 64, 128], not [3, 64, 128]" in message


def test_layernorm_1p(checkpoint: Path, tmp_path: Path) -> None:
    """--apply-layernorm-1p keeps norm weights minus one."""
    before = Case.open(checkpoint)
    plain = HFTensors(before.checkpoint, before.config)
    change_arguments(checkpoint, layernorm_zero_centered_gamma=True)
    export(checkpoint, tmp_path / "out")
    after = Case.open(checkpoint)
    shifted = HFTensors(after.checkpoint, after.config)
    norms = [name for name in plain if "norm" in name]
    assert len(norms) == 9
    for name in plain:
        assert torch.equal(shifted[name], plain[name] + (name in norms))


def test_diverged(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read
    monkeypatch.setattr(
        mapping.Checkpoint, "read", lambda self, key, row=None: read(self, key, row) / 0
    )
    assert "infinite or NaN" in refused(checkpoint, tmp_path, capsys)


def test_too_large_for_fp16(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read
    monkeypatch.setattr(
        mapping.Checkpoint, "read", lambda self, key, row=None: read(self, key, row) * 1e7
    )
    assert "--dtype keep or fp32" in refused(checkpoint, tmp_path, capsys, "--dtype", "fp16")


def test_where_a_checkpoint_lies(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    folder = checkpoint / "iter_0000001"
    assert find_iteration(checkpoint) == find_iteration(checkpoint, 1) == folder
    assert find_iteration(folder) == find_iteration(folder, 1) == folder
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path, capsys)
    assert "has iter_0000001" in refused(checkpoint, tmp_path, capsys, "--iteration", "7")
    assert "drop --iteration 7" in refused(folder, tmp_path, capsys, "--iteration", "7")
    (checkpoint / "latest_checkpointed_iteration.txt").unlink()
    assert "no latest_checkpointed_iteration.txt" in refused(checkpoint, tmp_path, capsys)
    (folder / ".metadata").unlink()
    assert "did not finish" in refused(folder, tmp_path, capsys)


def test_other_formats(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    folder = checkpoint / "iter_0000001"
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "format 'zarr'" in refused(checkpoint, tmp_path, capsys)
    (folder / "metadata.json").unlink()
    assert "only --ckpt-format torch_dist" in refused(checkpoint, tmp_path, capsys)
    (folder / "mp_rank_00").mkdir()
    assert "--ckpt-convert-format torch_dist" in refused(checkpoint, tmp_path, capsys)


def test_shard_size(checkpoints: Path, tmp_path: Path, capsys: Any) -> None:
    message = refused(checkpoints / "mup-pp2", tmp_path, capsys, "--max-shard-size", "big")
    assert "--max-shard-size big: a number and KB, MB, GB or TB" in message


def small_tokenizer(file: Path, tokens: int) -> Path:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<|endoftext|>"])
    tokenizer.train_from_iterator([[f"w{i}" for i in range(tokens - 2)]], trainer)
    tokenizer.save(str(file))
    return file


def test_tokenizer_file_and_folder(checkpoint: Path, tmp_path: Path) -> None:
    """Its tokens are the vocabulary's; its end of text ends generation; a folder is copied."""
    file = small_tokenizer(tmp_path / "tokenizer.json", 100)
    export(checkpoint, tmp_path / "file", tokenizer=file)
    export(checkpoint, tmp_path / "folder", tokenizer=tmp_path / "file")
    for name in ("file", "folder"):
        out = tmp_path / name
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 100
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.eos_token == "<|endoftext|>"
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["w5"])) == "w5"


def test_tokenizer_of_another_model(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    file = small_tokenizer(tmp_path / "tokenizer.json", 300)
    message = refused(checkpoint, tmp_path, capsys, "--tokenizer", str(file))
    assert "300 tokens, but the checkpoint's embedding has 256 rows" in message
    (tmp_path / "broken.json").write_text("{}")
    message = refused(checkpoint, tmp_path, capsys, "--tokenizer", str(tmp_path / "broken.json"))
    assert "not a tokenizer" in message


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}, 256),
        ({"tokenizer_type": "TikTokenizer", "vocab_size": 200}, 200),
        (
            {"tokenizer_type": "TikTokenizer", "vocab_size": 100, "tensor_model_parallel_size": 1},
            256,
        ),
    ],
)
def test_vocabulary_without_tokenizer(
    changes: dict[str, Any], size: int, checkpoint: Path, tmp_path: Path
) -> None:
    """--vocab-size counts only where the padding follows from it; else all rows are kept."""
    change_arguments(checkpoint, **changes)
    export(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
