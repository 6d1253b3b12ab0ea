"""The output appears whole, verified, or not at all."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_plugins import export_hf
from megatron_plugins.export import run
from megatron_plugins.export.run import export
from torch_plugins.config import ConfigError
from torch_plugins.export import writer
from torch_plugins.export.proof import VerificationError

pytestmark = pytest.mark.usefixtures("without_megatron")


@pytest.fixture
def load(checkpoints: Path) -> Path:
    return checkpoints / "llama-gqa-tp2"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder that the export works in."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def old_model(place: Path) -> Path:
    (place / "out").mkdir()
    (place / "out" / "config.json").write_text("old")
    return place / "out"


def test_never_overwritten_without_force(load: Path, place: Path) -> None:
    output = old_model(place)
    with pytest.raises(ConfigError, match="--force replaces it"):
        export(load, output)
    assert (output / "config.json").read_text() == "old"
    assert list(place.iterdir()) == [output]


def test_force(load: Path, place: Path) -> None:
    output = old_model(place)
    (output / "stale.bin").touch()
    export(load, output, force=True)
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert not (output / "stale.bin").exists()
    assert list(place.iterdir()) == [output]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_force_replaces_model_folders_only(kind: str, load: Path, place: Path) -> None:
    output = place / "out"
    if kind == "file":
        output.write_text("precious")
    elif kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
    else:
        (place / "elsewhere").mkdir()
        output.symlink_to(place / "elsewhere")
    before = sorted(place.iterdir())
    with pytest.raises(ConfigError, match="model folders only"):
        export(load, output, force=True)
    assert sorted(place.iterdir()) == before


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("disk full")


def terminate(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["write_weights", "rename"])
@pytest.mark.parametrize(
    ("end", "error"), [(fail, OSError), (terminate, SystemExit), (interrupt, KeyboardInterrupt)]
)
def test_interrupted_export_leaves_nothing(
    end: Callable[..., None],
    error: type[BaseException],
    step: str,
    load: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half-way through the files, and after all of them but before the folder has its name."""
    owner = writer if step == "write_weights" else Path
    monkeypatch.setattr(owner, step, end)
    with pytest.raises(error):
        export(load, place / "out")
    assert list(place.iterdir()) == []


def test_failed_replacement_restores(
    load: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is out of the way when the new one cannot take its place."""
    output = old_model(place)
    rename = Path.rename

    def only_old(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("cannot rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_old)
    with pytest.raises(OSError, match="cannot rename"):
        export(load, output, force=True)
    assert (output / "config.json").read_text() == "old"
    assert list(place.iterdir()) == [output]


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


LAYER = "model.layers.3"
MUTATIONS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "gate for up": lambda t: swap(
        t, f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"
    ),
    "key for value": lambda t: swap(
        t, f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"
    ),
    "norms": lambda t: swap(
        t, f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"
    ),
    "one query head": lambda t: t[f"{LAYER}.self_attn.q_proj.weight"][:16].mul_(1.01),
    "one row of the head": lambda t: t["lm_head.weight"][254].mul_(1.01),
    "layer order": lambda t: [
        swap(t, name, name.replace(LAYER, "model.layers.2")) for name in list(t) if LAYER in name
    ],
}


@pytest.mark.parametrize("name", [*MUTATIONS, "rope_theta", "rms_norm_eps"])
def test_wrong_model_is_removed(
    name: str, load: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Verification fails on a small error in one place, and takes the folder with it."""
    write_model = run.write_model

    def mutated(folder: Path, *args: Any) -> str:
        result = write_model(folder, *args)
        if name in MUTATIONS:
            tensors = load_file(folder / "model.safetensors")
            MUTATIONS[name](tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            config = json.loads((folder / "config.json").read_text())
            target = config if name in config else config["rope_parameters"]
            target[name] *= 1.1
            (folder / "config.json").write_text(json.dumps(config))
        return result

    monkeypatch.setattr(run, "write_model", mutated)
    output = old_model(place)
    with pytest.raises(VerificationError, match="logits differ"):
        export(load, output, force=True)
    assert (output / "config.json").read_text() == "old"
    assert export_hf.main(["--load", str(load), "--output", str(place / "new")]) == 1
    assert "nothing was left" in capsys.readouterr().err
    assert list(place.iterdir()) == [output]


def test_missing_tensor_is_not_filled_in(
    load: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would initialize it at random with no more than a warning."""
    write_model = run.write_model

    def without_norm(folder: Path, *args: Any) -> str:
        result = write_model(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return result

    monkeypatch.setattr(run, "write_model", without_norm)
    with pytest.raises(VerificationError, match=r"missing_keys.*model\.norm\.weight"):
        export(load, place / "out")
    assert list(place.iterdir()) == []


def test_folder_runs_on_its_own_code(
    checkpoints: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What proves a folder with code is that code, not the package it was copied from."""
    write_model = run.write_model

    def incomplete(folder: Path, *args: Any) -> str:
        result = write_model(folder, *args)
        (folder / "mlp.py").unlink()
        return result

    monkeypatch.setattr(run, "write_model", incomplete)
    with pytest.raises(VerificationError, match=r"does not load.*mlp\.py"):
        export(checkpoints / "ladder-last2-tp2", place / "out")
    assert list(place.iterdir()) == []
