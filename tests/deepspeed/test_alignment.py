"""TRL and PEFT on converted models: alignment_cases.py, whose script knows nothing of the
plugins."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deepspeed_plugins import export_hf
from tests.megatron.harness import launch

CASES = Path(__file__).with_name("alignment_cases.py")
pytestmark = pytest.mark.skipif(
    not (find_spec("trl") and find_spec("peft")), reason="wants trl and peft"
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment")
    offline = {"HF_HUB_OFFLINE": "1"}
    launch(CASES, folder / "record", folder, processes=1, environment=offline, timeout=400)
    return json.loads((folder / "record").read_text()) | {"folder": folder}


def test_reference_models_of_preference_tuning_stay_as_they_are(recorded):
    """Under ZeRO 2 and 3. A policy that is converted differs from its reference at once; with
    ``apply_to: all`` both are, and the loss of the first step is that of equal models."""
    for name in ("ZeRO 2", "ZeRO 3"):
        seen = recorded[name]
        assert (seen["policy"], seen["reference"]) == (
            "PluginDecoderForCausalLM",
            "LlamaForCausalLM",
        )
        assert seen["untouched"], name
        assert len(seen["losses"]) == 2
        assert abs(seen["losses"][0] - math.log(2)) > 1e-5
    assert recorded["ZeRO 3"]["losses"] == pytest.approx(recorded["ZeRO 2"]["losses"], rel=1e-4)
    assert recorded["all"]["reference"] == "PluginDecoderForCausalLM"
    assert recorded["all"]["losses"][0] == pytest.approx(math.log(2), rel=1e-6)


def test_the_policy_is_saved_as_the_decoder(recorded):
    for folder in ("dpo-2", "dpo-3"):
        model = AutoModelForCausalLM.from_pretrained(recorded["folder"] / folder)
        assert model.config.ladder_layers == (0, 1, 2, 3)
        assert model.config.kv_producers == (0, 0, 2, 2)


def test_adapters_train_on_a_model_that_has_the_features(recorded):
    seen = recorded["adapters"]
    assert seen["only adapters"]
    assert seen["moved"] == 2 * (4 + 2)  # queries of four layers, keys of two producers
    assert seen["class"] == "PluginDecoderForCausalLM"
    assert seen["losses"][0] == pytest.approx(seen["losses"][1], rel=1e-5)


def test_adapters_on_another_model_are_refused_by_name(recorded, tmp_path, capsys):
    assert recorded["refused"].keys() == {"Trainer", "initialize"}
    for message in recorded["refused"].values():
        assert "PEFT's adapters are added to a model that has the features already" in message
    checkpoint = recorded["folder"] / "lora" / "checkpoint-2"
    assert export_hf.main([str(checkpoint), str(tmp_path / "out")]) == 2
    assert "it holds PEFT's adapters; merge them" in capsys.readouterr().err
