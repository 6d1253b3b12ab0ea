"""What of a Hugging Face folder cannot become a checkpoint, and that nothing stays of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from megatron_plugins import convert
from megatron_plugins.from_hf import tensors as from_hf_tensors
from tests.parity.llama_folders import LLAMA3, SIZES, save
from tests.parity.test_export import folder_tensors
from torch_plugins.export.folder import Folder


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    assert convert.main([str(word) for word in words]) == status
    return capsys.readouterr().err


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"model_type": "mixtral"}, "model_type 'mixtral'; use one of llama, granite"),
    "other kind": ({"model_type": "granite"}, "model_type 'granite', not 'llama'; say granite"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: .*quantized weights"),
    "code": ({"auto_map": {"AutoModel": "m.M"}}, "auto_map: the folder has code of its own"),
    "shape": ({"intermediate_size": 80}, r"mlp.down_proj.weight is \[64, 96\], \[64, 80\] was"),
    "layers": ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight is missing"),
    "more": ({"num_hidden_layers": 3}, "layers.3.input_layernorm.weight is .*, nothing was"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu': SwiGLU"),
    "rope": (
        {"rope_parameters": {**LLAMA3, "factor": 32.0}},
        "rope_parameters .*'factor': 32.0.* llama3 with factor 8",
    ),
    "linear rope": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters .*Megatron's GPT builders know",
    ),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters.rope_type 'yarn'",
    ),
    "not JSON": ({}, "config.json: not JSON"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refused_configurations(
    name: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = CHANGES[name]
    source = Path(shutil.copytree(folders / "llama", tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    text = json.dumps(config | changes) if changes else "{"
    (source / "config.json").write_text(text)
    told = refused(capsys, "--from", "llama", source, "--to", tmp_path / "new")
    assert re.search(message, told), told
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def biased(**which: bool) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"num_hidden_layers": 2}, **which)


def test_biases(tmp_path: Path, capsys: pytest.CaptureFixture[str], without_megatron: None) -> None:
    """Megatron has them everywhere or nowhere."""
    for name in ("attention_bias", "mlp_bias"):
        source = save(biased(**{name: True}), tmp_path / name)
        told = refused(capsys, "--from", "hf", source, "--to", tmp_path / "new")
        assert f"{name} True: Megatron has a bias in all linear layers" in told
    source = save(biased(attention_bias=True, mlp_bias=True), tmp_path / "all")
    for words in (("hf", source, "--to", tmp_path / "ck"), ("megatron", tmp_path / "ck", "--to")):
        last = () if words[0] == "hf" else (tmp_path / "back",)
        assert convert.main(["--from", *map(str, (*words, *last))]) == 0
    expected, found = folder_tensors(source), folder_tensors(tmp_path / "back")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: x.clone() for name, x in folder_tensors(folder).items()}
    change(tensors)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What old folders keep beside them is ignored; what is not the model's is refused."""
    source, to = tmp_path / "source", tmp_path / "new"

    def changed(change: Callable[[dict[str, Tensor]], Any]) -> tuple[object, ...]:
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(folders / "granite", source)
        change_weights(source, change)
        return "--from", "granite", source, "--to", to

    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    words = changed(
        lambda x: x.update({"lm_head.weight": x[embedding].clone(), inv_freq: torch.ones(8)})
    )
    assert convert.main([str(word) for word in words]) == 0
    shutil.rmtree(to)
    words = changed(lambda x: x.update({"lm_head.weight": x[embedding] + 1}))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(capsys, *words)
    words = changed(lambda x: x.update({norm: x[norm].bfloat16()}))
    assert "BF16" in refused(capsys, *words)
    words = changed(lambda x: x.update({norm: x[norm].to(torch.int8)}))
    assert f"{norm} is I8; weights must be F32, F16 or BF16" in refused(capsys, *words)
    words = changed(lambda x: x[norm].fill_(float("nan")))
    assert f"{norm} has infinite or NaN values" in refused(capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_files(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only safetensors, only of the folder, whole, and into a new place."""
    source = Path(shutil.copytree(folders / "llama", tmp_path / "source"))
    words = ("--from", "llama", source, "--to", tmp_path / "new")
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../model-00001"))
    assert "'../model-00001" in refused(capsys, *words)
    index.write_text(text)
    file = source / "model-00001-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file.name}: " in refused(capsys, *words)
    file.unlink()
    assert f"it names {file.name}, which is not there" in refused(capsys, *words)
    index.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin: pickles are not read" in refused(capsys, *words)
    assert "no such folder" in refused(capsys, "--from", "hf", tmp_path / "no", *words[3:])
    assert "is not a folder; create" in refused(capsys, *words[:4], tmp_path / "no" / "new")
    assert f"--to {source} is there already" in refused(capsys, *words[:4], source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --from KIND PATH --to PATH, or --load"),
        ("--from llama {0}", "--from needs --to"),
        ("--from qwen {0} --to x", "--from qwen: use one of llama"),
        ("--load {0} --save x --ladder-layers all", "give it with the flags of the run"),
        ("--load {0} --save x --no-verify", "--load with --no-verify: these belong to --from"),
        ("--from llama {0} --to x --kv mean", "--from with --kv: these belong to --load"),
        ("--from hf {0} --to x --cla-sharing-factor 2", "convert once more, with --load CKPT"),
        ("--from hf {0} --to x --iteration 3", "--iteration belongs to --from megatron"),
        ("--from megatron {0} --to x --no-verify", "logits are always compared"),
        ("--from megatron {0} --to x --ladder-layers all", "'none' leaves the ladder out"),
        ("--from llama {0} --to x --ladder-layers 9", "ladder_residual.layers"),
    ],
)
def test_words(words: str, message: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, *words.format(folders / "llama").split())
    assert message in told, told
    assert not Path("x").exists()


def test_a_full_disk_is_seen_before(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    words = ("--from", "llama", folders / "llama", "--to", tmp_path / "new")
    assert "0.0 GB are needed" in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_a_failure(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither of one while it is read, nor of a checkpoint with other logits."""
    words = ("--from", "llama", folders / "llama", "--to", tmp_path / "new")
    assemble = from_hf_tensors._assemble

    def broken(folder: Folder, rule: Any, names: list[str], rows: int) -> Tensor:
        if "layers.2.mlp" in names[0]:
            raise KeyboardInterrupt
        return assemble(folder, rule, names, rows)

    def swapped(folder: Folder, rule: Any, names: list[str], rows: int) -> Tensor:
        order = [0, 2, 1] if len(names) == 3 else range(len(names))
        return assemble(folder, rule, [names[i] for i in order], rows)

    monkeypatch.setattr(from_hf_tensors, "_assemble", broken)
    with pytest.raises(KeyboardInterrupt):
        convert.main([str(word) for word in words])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(from_hf_tensors, "_assemble", swapped)
    told = refused(capsys, *words, status=1)
    assert "the checkpoint's logits differ: max abs difference" in told
    assert list(tmp_path.iterdir()) == []
    assert convert.main([*map(str, words), "--no-verify"]) == 0
    assert "logits not compared (--no-verify)" in capsys.readouterr().out
