"""W4A4 from DeepSpeed's JSON: engines on two ranks in w4a4_cases.py, an export, and the alias where
nobody reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deepspeed_plugins import export_hf
from deepspeed_plugins.seams import versions
from tests.megatron.harness import launch
from torch_plugins.hf import PluginDecoderForCausalLM
from torch_plugins.w4a4.linear import fake_quant_linears

CASES = Path(__file__).with_name("w4a4_cases.py")
REPEATABLE = versions.installed() >= (0, 19, 8)
"""Before, ZeRO 3 on CPU gives other weights in every run, some of them not a number."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What w4a4_cases.py recorded."""
    folder = tmp_path_factory.mktemp("cases")
    _, logs = launch(CASES, folder / "record", folder, processes=2, timeout=280)
    return {"logs": logs, "folder": folder, **json.loads((folder / "record").read_text())}


def counted(cases):
    """Cases of torch, without those that older releases compute differently each time."""
    return {k: v for k, v in cases["torch"].items() if REPEATABLE or "ZeRO 3" not in k}


def test_updates_equal_those_of_plain_torch(cases):
    """Weights and clips after three steps: the first sets clips at percentiles over all ranks and
    micro-batches; ZeRO 0 to 3, one and two micro-batches, weights in four bits too."""
    assert len(cases["torch"]) == 16
    for name, seen in counted(cases).items():
        half = name[:4] in ("bf16", "fp16")
        assert seen["error"]["weights"] < (0.15 if half else 1e-5), name
        assert seen["unquantized"] > 0.12, name  # quantization matters
        assert seen["without penalty"] > 0.25, name  # and so does the kurtosis
        assert seen["moved"] > 2e-3, name
        if not half:
            assert seen["error"]["clips"] < 1e-3, name


def test_kurtosis_is_logged_once(cases):
    for name, seen in counted(cases).items():
        found, expected = seen["logged"]
        assert found == pytest.approx(expected, rel=2e-2 if "16" in name else 1e-5), name


def test_zero_3_keeps_no_quantized_weight(cases):
    assert cases["saved"] == []


def test_a_skipped_step_is_observed_again(cases):
    """Clips are the percentiles of the first step that fp16 takes, and stay two steps later."""
    seen = cases["overflow"]
    assert seen["skipped"] > 1
    assert seen["modes"] == ["observe"] * (seen["skipped"] + 1) + ["quantize"] * 3
    clip, expected, last = seen["clips"]
    assert clip == pytest.approx(expected, rel=1e-3)
    assert last == pytest.approx(clip, rel=1e-2)


def test_modes_follow_the_iteration_and_evaluation_is_not_observed(cases):
    """Evaluation by ``eval`` and by ``no_grad`` alone, on inputs a hundred times as large."""
    assert cases["modes"]["modes"] == ["off", "observe", "quantize", "quantize"]
    assert cases["modes"]["highest"] < 10


def test_groups_of_clips(cases):
    """Rates and weight decays after two steps: no decay of clips, and eight times the rate of their
    weights, which WarmupLR would make alike."""
    seen = cases["groups"]
    for stage in (1, 3):
        assert seen[f"list, ZeRO {stage}"] == [[0.3, 0.2], pytest.approx([2.4, 0])]
    for name in ("none", "clips of before"):
        assert seen[name] == [[0.1, 0.2], [0.8, 0]]
    assert seen["groups"] == [[0.2, 0], [0.1, 0.2], [1.6, 0], [0.8, 0]]
    assert seen["client"] == [[0.05, 0], [0.025, 0.2], [0.4, 0], [0.2, 0]]
    assert seen["scheduler of the script"] == [[0.05, 0.2], [0.4, 0]]
    assert seen["callable"] == [[0.1, 0.01], [0.8, 0]]


def test_clips_of_frozen_weights_are_set_and_stay(cases):
    trains, clip = cases["groups"]["frozen"]
    assert not trains
    assert clip > 1


def test_a_resumed_run_ends_as_the_straight_one(cases):
    """To the bit, for ZeRO 0, 1 and 3; one saved before its clips were measured, too."""
    for name, seen in cases["resumed"].items():
        if name != "3" or REPEATABLE:
            assert seen["equal"], name
        assert list(seen["state"]) == ["mine"], name
        assert seen["clip"] > 1


def test_a_universal_checkpoint_goes_on(cases):
    assert cases["universal"] == pytest.approx(cases["resumed"]["1"]["clip"], rel=1e-5)


def test_checkpoints_of_other_models(cases):
    seen = cases["checkpoints"]
    for stage in (1, 3):
        told = seen[f"ZeRO {stage}, with into without"]
        assert "would compute another function without it. Give the same in" in told
        told = seen[f"ZeRO {stage}, without into with"]
        assert "has no w4a4, and this run has: its optimizer knows no clips" in told
        assert seen[f"ZeRO {stage}, start"] > 1
    assert "this run {'activation_bits': 3" in seen["other bits"]


def test_what_an_engine_says(cases):
    lines = cases["logs"][0].splitlines()
    told = "w4a4: 2 of 3 linear layers, inputs 4 bits (learned clips from 2), weights 4 bits, "
    told += "kurtosis 0.05"
    assert told in lines
    alone = 'w4a4: left alone, an engine without an optimizer ("apply_to": "trained")'
    assert alone in lines
    assert "w4a4: " not in cases["logs"][1]


def test_engines_without_an_optimizer_or_clips_and_the_alias(cases):
    layers = {"alias": ["0", "2"], "left alone": [], "all": ["0", "2"]}
    groups = {"{'activation_bits': 0}": 1, "{'granularity': 'token'}": 1}
    assert cases["alone"] == layers | groups


REFUSED = {
    "autotp": "w4a4 with tensor_parallel.autotp_size 2: AutoTP would replace the linear layers",
    "pipeline": "w4a4: a PipelineModule is cut into stages; use ZeRO",
    "nothing": "'*mlp*': matches no linear layer of Sequential; names are such as 0, 2, 4",
    "field": "w4a4: unknown key 'kurtosis'; did you mean 'kurtosis_weight'?",
    "muon": "clip_lr_mult 8.0: Muon makes groups of its own",
    "experts": "w4a4 with dense_moe: its experts are computed without their linear layers",
    "no section": "the JSON has no deepspeed_plugins.w4a4 for its clips; add it, with the same",
    "other bits": "give the same bits, granularity and grid",
    "both": "compression_training.w4a4 and deepspeed_plugins.w4a4: give one of them",
    "beside": "compression_training: w4a4 goes alone there; drop weight_quantization",
    "unseen": "1.input_quantizer saw no finite input in the step that clips start from",
    "order": "the clips of 2.input_quantizer have become",
}


def test_refused_by_name(cases):
    assert cases["refused"].keys() == REFUSED.keys()
    for name, message in REFUSED.items():
        assert message in cases["refused"][name]


def test_a_ladder_with_w4a4_is_exported(cases, tmp_path, capsys):
    """The logits of the folder are the engine's; partitioned models train as whole ones do."""
    assert len(cases["composed"]["layers"]) == 6
    assert cases["composed"]["partitioned"] < 1e-6
    out = tmp_path / "out"
    assert export_hf.main([str(cases["folder"] / "ladder"), str(out)]) == 0
    assert "as plugin_decoder" in capsys.readouterr().out
    kept = torch.load(cases["folder"] / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model) is PluginDecoderForCausalLM
    assert sorted(fake_quant_linears(model)) == cases["composed"]["layers"]
    torch.testing.assert_close(model(kept["ids"]).logits, kept["logits"], rtol=1e-4, atol=1e-4)


def test_save_pretrained_of_an_engine_writes_the_mark(cases):
    model = AutoModelForCausalLM.from_pretrained(cases["folder"] / "saved")
    assert type(model) is LlamaForCausalLM
    found = fake_quant_linears(model)
    assert sorted(found) == cases["composed"]["layers"]
    assert all(layer.input_quantizer.clip_high > 0 for layer in found.values())


ALIAS = {"train_batch_size": 1, "compression_training": {"w4a4": {}}}
NEW = pytest.mark.skipif(
    versions.installed() < (0, 19, 7), reason="DeepSpeed's compression library reads the key"
)


@NEW
def test_deepspeed_alone_refuses_the_alias():
    code = f"from deepspeed.runtime.config import DeepSpeedConfig; DeepSpeedConfig({ALIAS})"
    environment = {**os.environ, "DEEPSPEED_PLUGINS_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode != 0
    assert "'compression_training' block would be ignored" in done.stderr


@NEW
def test_other_keys_there_keep_the_error_of_deepspeed():
    for section in ({"weight_quantization": {}}, {}, 3):
        with pytest.raises(DeepSpeedConfigError, match="'compression_training' block would be"):
            DeepSpeedConfig(ALIAS | {"compression_training": section})
    assert DeepSpeedConfig(ALIAS).train_batch_size == 1
