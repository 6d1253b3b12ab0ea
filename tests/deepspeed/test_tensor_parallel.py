"""Converted models under AutoTP: two ranks in tensor_parallel_cases.py, and what they saved."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspeed_plugins import export_hf
from deepspeed_plugins.export.checkpoint import Checkpoint, Shards, Weights
from deepspeed_plugins.seams import versions
from tests.deepspeed.trainer_cases import Pieces
from tests.megatron.harness import launch
from torch_plugins.config import ConfigError
from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM

CASES = Path(__file__).with_name("tensor_parallel_cases.py")
pytestmark = pytest.mark.skipif(
    (versions.installed() or ()) < versions.AUTOTP_OLDEST, reason="refused: another AutoTP"
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    _, logs = launch(CASES, folder / "record", folder, processes=2, timeout=400)
    return json.loads((folder / "record").read_text()) | {"folder": folder, "logs": logs}


def test_two_ranks_train_as_one_process_does(recorded):
    """ZeRO 0 to 3, biases, norms on local heads, shared keys and values, checkpointing."""
    assert len(recorded["one process"]) == 5
    for name, seen in recorded["one process"].items():
        assert seen["losses"] < 1e-6, name
        assert seen["gradients"] < 5e-6, name
        assert seen["hidden states"] < 1e-4, name
        assert seen["handed over"], name


def test_a_reduction_is_waited_for_once_the_next_module_has_started(recorded):
    events = [tuple(event) for event in recorded["order"]["events"]]
    modules = [f"{part} {layer}" for layer in range(4) for part in ("self_attn", "mlp")]
    assert [name for kind, name in events if kind == "start"] == modules
    started = [buffer for kind, buffer in events if kind == "async"]
    assert len(started) == 7
    for buffer, own, following in zip(started, modules, modules[1:], strict=False):
        places = [("start", own), ("async", buffer), ("start", following), ("arrived", buffer)]
        assert sorted(places, key=events.index) == places
    last = events.index(("start", modules[-1]))
    assert [kind for kind, _ in events[last:]] == ["start", "sync", "arrived"]


def test_a_step_has_as_many_reductions_as_that_of_the_stock_model(recorded):
    stock, ladder = recorded["order"]["all-reduces"]
    assert stock == ladder >= 4 * 2


def test_one_line_says_what_overlaps(recorded):
    lines = recorded["logs"][0].splitlines()
    assert "ladder-residual: 4 of 4 layers, 7 of 8 all-reduces overlap the next module" in lines
    assert "ladder-residual: 2 of 4 layers, 4 of 8 all-reduces overlap the next module" in lines


def test_runs_go_on(recorded):
    """From a checkpoint, and by a second engine on a model that overlaps already."""
    assert recorded["saved"]["resumed"]
    assert recorded["order"]["again"]


def test_trainer_saves_the_whole_decoder(recorded):
    model, report = AutoModelForCausalLM.from_pretrained(
        recorded["folder"] / "trainer" / "saved", output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.ladder_layers == (1, 2, 3)
    data = Pieces().data
    assert model(data, labels=data).loss.item() == pytest.approx(recorded["trainer"], rel=1e-5)


def test_the_export_joins_what_the_ranks_hold(recorded, tmp_path, capsys):
    folder = recorded["folder"]
    kept = torch.load(folder / "logits-cut.pt")
    assert export_hf.main([str(folder / "cut"), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(model(kept["ids"]).logits, kept["logits"], rtol=1e-5, atol=1e-5)
    model.load_state_dict(torch.load(folder / "gathered.pt"))
    torch.testing.assert_close(model(kept["ids"]).logits, kept["logits"], rtol=1e-5, atol=1e-5)
    for stage in (0, 2):  # without states of an optimizer; a tied head, cut over the vocabulary
        found = Checkpoint(folder / f"stage-{stage}")
        model = PluginDecoderForCausalLM(PluginDecoderConfig.from_dict(found.config))
        expected = dict(model.named_parameters())
        tensors = Weights(found.weights(expected), expected, torch.float32)
        assert all(tensors[name].shape == p.shape for name, p in expected.items())
    capsys.readouterr()
    assert export_hf.main([str(folder / "stage-3"), str(tmp_path / "none")]) == 2
    assert "gather it where it trains, by Trainer.save_model" in capsys.readouterr().err


def test_parts_that_make_no_whole_are_refused():
    parts, whole = [torch.zeros(2, 3), torch.ones(2, 3)], torch.Size((4, 3))
    assert Shards("w", parts, whole).contiguous().tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
    for shape in ((2, 3), (5, 3), (4, 6)):
        with pytest.raises(ConfigError, match="w of the ranks"):
            Shards("w", parts, torch.Size(shape)).contiguous()
