"""The scripts of examples/deepspeed with every ds_config.json of the examples, and the exports."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deepspeed_plugins import export_hf
from tests.megatron.harness import launch
from torch_plugins.hf import PluginDecoderForCausalLM

CASES = Path(__file__).with_name("example_cases.py")
STEPS = 10
LADDER = "ladder-residual: 4 of 4 layers"
SHARING = "cross-layer-attention: 2 of 4 layers share keys and values (producers 0, 2)"
EXPERTS = "dense-moe: 8 experts in 4 layers, linear routers; evaluation dense"
FOUR_BITS = (
    "w4a4: 28 of 29 linear layers, inputs 4 bits (learned clips from percentile:99.9), "
    "kurtosis 1e-05"
)
POWER = "power-lr: peak 0.01, a 4, b -0.51, {} sequences of 128 tokens, warms up over {} tokens"
ACTIVE = {
    "together": [LADDER, SHARING, POWER.format(8, "8,192")],
    "ladder": [LADDER],
    "sharing": [SHARING],
    "power": [POWER.format(16, "20,480")],
    "experts": [EXPERTS],
    "four bits": [FOUR_BITS],
}
TRAINER = ACTIVE | {"power": [POWER.format(8, "1,024") + ", decays over the last 20,480 tokens"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def outputs(folder):
    """By run, its lines; the text is this repository's."""
    text = folder / "text.txt"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted(CASES.parent.glob("*.py"))))
    _, (log,) = launch(CASES, text, folder, STEPS, processes=1, timeout=300)
    parts = re.split(r"^== (.*)\n", log, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", ACTIVE)
def test_a_json_turns_its_features_on(outputs, name):
    """And no other, in both scripts; the loss falls below that of equal odds, ln 256."""
    for run, expected in ((name, ACTIVE[name]), (f"{name}, Trainer", TRAINER[name])):
        pattern = r"^(?:ladder-residual|cross-layer|power-lr|dense-moe|w4a4).*"
        lines = re.findall(pattern, outputs[run], re.MULTILINE)
        assert len(lines) == len(expected)
        assert all(map(str.startswith, sorted(lines), sorted(expected))), lines
    loss = re.search(rf"^step +{STEPS}  lr \S+  loss (\S+)$", outputs[name], re.MULTILINE)
    assert float(loss[1]) < 5.545


def test_a_run_goes_on(outputs):
    steps = re.findall(r"^step +(\d+)  lr (\S+)", outputs["together, resumed"], re.MULTILINE)
    tokens = 8 * 128
    rate = tokens / 4096 * 4 * (19 * tokens) ** -0.51
    assert steps == [("20", f"{rate:.6f}")]


@pytest.mark.parametrize("name", ["together", "ladder", "sharing"])
def test_what_it_saved_is_exported(outputs, folder, tmp_path, name):
    assert export_hf.main([str(folder / name), str(tmp_path / "out")]) == 0
    for saved in (tmp_path / "out", folder / f"{name}, Trainer"):
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert type(model) is PluginDecoderForCausalLM
        assert bool(model.config.ladder_layers) == (name != "sharing")
        assert (model.config.kv_producers == (0, 0, 2, 2)) == (name != "ladder")
