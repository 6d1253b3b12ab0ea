"""Auxiliary losses in DeepSpeed engines: settings here, engines on two ranks in
auxiliary_cases.py."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from deepspeed_plugins.auxiliary_loss import UNSCALED_FP16
from deepspeed_plugins.seams import versions
from tests.megatron.harness import launch
from torch_plugins.config import ConfigError

CASES = Path(__file__).with_name("auxiliary_cases.py")
BEFORE_0_19_6 = versions.installed() < (0, 19, 6)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What auxiliary_cases.py recorded."""
    folder = tmp_path_factory.mktemp("cases")
    _, logs = launch(CASES, folder / "record", folder, processes=2, timeout=300)
    return {"logs": logs, **json.loads((folder / "record").read_text())}


TOLERANCES = {"fp16": (5e-3, 1e-3), "bf16": (3e-2, 2e-3)}
"""Relative error of an update, and of its length alone; elsewhere fp32's."""


def test_updates_equal_those_of_plain_torch_with_the_sum_of_the_losses(cases):
    """ZeRO 0 to 3, accumulation, fp32, bf16 and fp16, both kinds of checkpointing and DeepSpeed's,
    every way to start a backward pass, several engines, pipelines.

    Before 0.19.8, ZeRO 3 on CPU gives other weights in every run, some of them not a number.
    """
    repeatable = versions.installed() >= (0, 19, 8)
    assert len(cases["torch"]) == (42 if repeatable else 38)
    for name, seen in cases["torch"].items():
        if repeatable or "ZeRO 3" not in name:
            assert seen["without"] > 0.5, name  # auxiliary losses matter
            precision = next((key for key in TOLERANCES if key in name), None)
            error, length = TOLERANCES.get(precision, (1e-5, 1e-5))
            assert seen["error"] < error, name
            assert abs(seen["ratio"] - 1) < length, name


def test_the_monitor_has_the_mean_over_ranks_and_micro_batches(cases):
    """Under reentrant checkpointing, with evaluation between the steps; and from both stages."""
    zero, stages = cases["logged"]
    for (rows, means, *_), samples in ((zero, 8), (stages, 2 if BEFORE_0_19_6 else 4)):
        assert [row[0] for row in rows] == [samples, 2 * samples]
        assert [row[1] for row in rows] == pytest.approx(means, rel=1e-6)
    assert zero[2] == pytest.approx(zero[1][-1], rel=1e-6)


def test_engines_keep_their_values_apart(cases):
    for name in ("interleaved, fp16", "interleaved, ZeRO 3"):
        seen, expected = cases["torch"][name]["means"]
        assert seen == pytest.approx(expected, rel=1e-2), name


def test_one_line_says_which_losses_an_engine_has(cases):
    line = "auxiliary-losses: penalty (coefficient 2) in 1 module, penalty (coefficient 3) in 1 mod"
    assert line in cases["logs"][0]
    assert "auxiliary-losses" not in cases["logs"][1]


def test_an_engine_without_an_optimizer_leaves_its_models_losses_alone(cases):
    assert cases["reference"]


def test_what_is_refused(cases):
    refused = cases["refused"]
    assert "fp16 and zero_optimization.stage 0: deepspeed" in refused["fp16"]
    assert "the model returns several tensors, such as loss and logits" in refused["outputs"]
    assert "RuntimeError: auxiliary loss penalty: attached to activations" in refused["lost"]
    assert "set its scale for that pass; run the engine, not its module" in refused["module"]
    assert "aux_micro_batches 2: the model has no auxiliary loss" in refused["nothing"]
    if BEFORE_0_19_6:
        assert "the model returns several tensors" in refused["engine"]
        assert "divides the gradient by the steps at each stage" in refused["stages"]
    else:
        assert refused["engine"] is None
        assert refused["stages"] is None


def test_refusals_are_about_faults_that_deepspeed_has(cases):
    """Updates without plugins over torch's: of fp16 without ZeRO at loss scale 4, and of a script's
    own backward pass through loss and logits in two micro-batches."""
    faults = cases["faults"]
    if versions.installed() <= UNSCALED_FP16:
        assert faults["fp16"] == pytest.approx(1 / 4, rel=1e-2)
    assert faults["outputs"] == pytest.approx(1 / 2, rel=1e-5)
    assert faults["outputs, ZeRO 3"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "steps", "message"),
    [
        (0, 1, r"aux_micro_batches 0: must be a positive integer"),
        (2.0, 1, r"aux_micro_batches 2.0: must be a positive integer"),
        (True, 1, r"aux_micro_batches True: must be a positive integer"),
        ("auto", 1, r'aux_micro_batches "auto": Hugging Face fills it nowhere'),
        (2, 4, r"aux_micro_batches 2 with gradient_accumulation_steps 4: .* drop it"),
    ],
)
def test_wrong_numbers_of_micro_batches(value, steps, message):
    section = {"aux_micro_batches": value}
    with pytest.raises(ConfigError, match=message):
        DeepSpeedConfig(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": steps,
                "deepspeed_plugins": section,
            }
        )


def test_unknown_keys_are_told_apart():
    with pytest.raises(ConfigError, match=r"'aux_micro_batch'; did you mean 'aux_micro_batches'"):
        DeepSpeedConfig({"train_batch_size": 1, "deepspeed_plugins": {"aux_micro_batch": 2}})
