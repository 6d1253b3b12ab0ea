"""Power LR in Trainer and accelerate: settings here, two processes in trainer_cases.py."""

import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, SchedulerType, TrainingArguments, get_scheduler

from tests.megatron.harness import launch
from torch_plugins.config import ConfigError, PowerLR
from torch_plugins.power_lr import Schedule
from torch_plugins.trainer import add_member

CASES = Path(__file__).with_name("trainer_cases.py")
ROOT = Path(__file__).parents[2]
STEP = 2 * 2 * 2 * 16
"""Tokens of an optimizer step: sequences of a process, micro-batches, processes, tokens."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What trainer_cases.py recorded on two processes."""
    folder = tmp_path_factory.mktemp("cases")
    environment = {"TORCH_EXTENSIONS_DIR": str(folder), "TORCHDYNAMO_DISABLE": "1"}
    _, logs = launch(CASES, folder, processes=2, environment=environment, timeout=300)
    return {"logs": logs, **json.loads((folder / "record.json").read_text())}


def test_rates_equal_the_closed_form(cases):
    """Trainer alone and with every kind of JSON; straight and resumed, which end alike."""
    power = PowerLR(decay_tokens=3 * STEP, decay_style="linear")
    schedule = Schedule(power, max_lr=0.01, warmup_tokens=2 * STEP, total_tokens=8 * STEP)
    expected = [float(schedule.rate(step * STEP, STEP)) for step in range(8)]
    assert len(cases["rates"]) == 6
    for name, (straight, resumed, alike) in cases["rates"].items():
        assert straight == expected, name
        assert resumed == expected[3:], name
        assert alike, name


def test_one_line_a_run(cases):
    line = "power-lr: peak 0.01, a 4, b -0.51, 8 sequences of 16 tokens, warms up over 256 tokens"
    assert cases["logs"][0].count(line) == 2 * 6
    assert "power-lr: " not in cases["logs"][1]


def test_a_prepared_scheduler_steps_once_per_optimizer_step(cases):
    """accelerate alone, and with DeepSpeed."""
    assert cases["tokens"] == [["MULTI_CPU", 3 * 4 * 16], ["DEEPSPEED", 3 * 4 * 16]]


def test_a_scheduler_in_the_json_goes_before_the_arguments(cases):
    assert 'lr_scheduler_type "power" is not read where the DeepSpeed JSON' in cases["refused"]


def arguments(folder, kwargs, **options):
    given = {"lr_scheduler_type": "power", "lr_scheduler_kwargs": kwargs, "use_cpu": True}
    return TrainingArguments(str(folder), **given, **options)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"lr_scheduler_kwargs.sequence_length is missing"),
        ({"sequence_lenght": 8}, r"sequence_lenght: unknown; did you mean 'sequence_length'"),
        ({"sequence_length": 8, "total_num_steps": 9}, r"total_num_steps: set max_steps or num_"),
        ({"sequence_length": 8, "warmup_max_lr": 1}, r"warmup_max_lr: set learning_rate of Train"),
        ({"sequence_length": 8, "warmup_tokens": 8}, r"warmup_tokens or warmup_num_steps, not bo"),
    ],
)
def test_wrong_settings_before_a_model_is_built(tmp_path, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, kwargs, warmup_steps=2)


def test_command_line():
    words = ["--output_dir", "x", "--lr_scheduler_type", "power", "--use_cpu"]
    words += ["--lr_scheduler_kwargs", '{"sequence_length": 8}']
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    assert parsed.lr_scheduler_type is SchedulerType.POWER


def test_get_scheduler_outside_trainer():
    sgd = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    with pytest.raises(ConfigError, match=r"batch_size is missing: outside Trainer.create_sch"):
        get_scheduler("power", sgd, 2, 8, {"sequence_length": 16})
    own = {"sequence_length": 16, "batch_size": 8, "total_tokens": 4096, "decay_tokens": 1024}
    schedule = get_scheduler("power", sgd, 2, 8, own).schedule
    assert (schedule.warmup_tokens, schedule.total_tokens) == (256, 4096)


def test_a_member_added_at_run_time_is_like_the_others():
    class Kind(str, Enum):
        OLD = "old"

    for _ in range(2):
        add_member(Kind, "NEW", "new")
    assert list(Kind) == [Kind.OLD, Kind.NEW]
    assert Kind("new") is Kind["NEW"] is Kind.NEW
    assert isinstance(Kind.NEW, Kind)
    assert (Kind.NEW.name, Kind.NEW.value, Kind.NEW == "new") == ("NEW", "new", True)
    assert "new" in Kind._value2member_map_
    assert {Kind.NEW: 1}[Kind("new")] == 1
    with pytest.raises(AttributeError):
        Kind.NEW = "other"


def run(*command, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_import_door():
    code = (
        "from transformers import Trainer, SchedulerType, get_scheduler; import torch_plugins.hf\n"
        "print(SchedulerType('power'), Trainer.create_scheduler.__wrapped__.__name__)"
    )
    output = run("-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0", PYTHONPATH=str(ROOT))
    assert output == "SchedulerType.POWER create_scheduler\n"


def test_auto_classes_find_the_decoder(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    code = (
        "import sys, transformers; print('torch_plugins.hf' in sys.modules)\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__module__)"
    )
    output = run("-c", code)
    assert output == "False\ntorch_plugins.hf.modeling_plugin_decoder\n"


def test_example(tmp_path):
    """With a JSON of DeepSpeed: tests/deepspeed/test_examples.py."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    command = (
        ROOT / "examples/deepspeed/train_hf.py",
        "--text",
        text,
        "--output_dir",
        tmp_path / "out",
    )
    settings = ("--learning_rate", 0.01, "--max_steps", 4, "--report_to", "none", "--use_cpu")
    power = ("--lr_scheduler_type", "power", "--lr_scheduler_kwargs", '{"sequence_length": 128}')
    line = "power-lr: peak 0.01, a 4, b -0.51, 8 sequences of 128 tokens\n"
    assert line in run(*command, *settings, *power)
