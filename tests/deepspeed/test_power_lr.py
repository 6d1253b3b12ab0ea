"""Power LR from DeepSpeed's JSON: settings here, engines on one and two ranks in power_cases.py."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

from deepspeed_plugins.power_lr import PowerLR, register
from deepspeed_plugins.seams import versions
from tests.megatron.harness import launch
from torch_plugins.config import ConfigError
from torch_plugins.config import PowerLR as PowerLRConfig
from torch_plugins.power_lr import Schedule

CASES = Path(__file__).with_name("power_cases.py")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """By number of ranks, what power_cases.py recorded."""

    def run(ranks):
        record = folder / f"{ranks}.json"
        _, logs = launch(CASES, record, processes=ranks, timeout=300)
        return {"ranks": ranks, "logs": logs, **json.loads(record.read_text())}

    folder = tmp_path_factory.mktemp("cases")
    with ThreadPoolExecutor() as pool:  # each waits for itself more than for a core
        return dict(zip((1, 2), pool.map(run, (1, 2)), strict=True))


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def cases(request, recorded):
    return recorded[request.param]


def test_rates_equal_the_closed_form_at_every_step(cases):
    """ZeRO 0 to 3, one and two micro-batches, pipeline; two groups; a batch that doubles."""
    assert len(cases["rates"]) == 10
    for name, (seen, expected) in cases["rates"].items():
        assert len(seen) == 12, name
        assert seen == expected, name
    rates = [biases for _, biases in cases["rates"]["ZeRO 3, 2 micro-batches"][0]]
    assert rates[0] == 0.001
    assert rates[0] < rates[1] < rates[2] < rates[3] <= 0.02
    assert rates[7] <= rates[8] > rates[9] > rates[10] > rates[11]


def test_a_resumed_run_ends_as_the_straight_one(cases):
    """Saved in the warm-up, the power phase and the last phase; ZeRO 1 and 3; to the bit.

    Before 0.19.8, ZeRO 3 on CPU gives other weights in every run, with any scheduler.
    """
    if cases["ranks"] == 1:
        pytest.skip("on two ranks")
    assert len(cases["resume"]) == 6
    repeatable = versions.installed() >= (0, 19, 8)
    for name, alike in cases["resume"].items():
        assert alike or ("ZeRO 3" in name and not repeatable), name


def test_what_is_refused_before_anything_is_built(cases):
    refused = cases["refused"]
    assert 'scheduler.params.warmup_num_steps "auto": nothing filled it' in refused["auto"]
    assert "do not fit into total_tokens" in refused["overlap"]
    assert "the script passes ConstantLR" in refused["two schedulers"]
    assert "drop lr_kwargs" in refused["lr_kwargs"]


def test_schedulers_of_the_script_follow_the_engines_batch(cases):
    tokens, batch = 2 * 4 * 512, 8 * cases["ranks"]
    schedule = Schedule(max_lr=0.1, power=PowerLRConfig(a=0.8))
    expected = [float(schedule.rate(tokens, batch * 512, ratio)) for ratio in (0.25, 1)]
    assert cases["clients"] == [[tokens, batch, *expected]] * 2


def test_skipped_steps_train_no_tokens(cases):
    if "overflow" not in cases:
        pytest.skip("no fp16 on this CPU")
    skipped, counted = cases["overflow"]
    assert 0 < skipped < 12
    assert counted == 12 - skipped


def test_one_line_says_what_is_active(cases):
    batch = 2 * cases["ranks"]
    line = (
        f"power-lr: peak 0.02, a 4, b -0.51, {batch} sequences of 512 tokens, warms up over "
        f"{3 * batch * 512:,} tokens, decays over the last {7 * batch * 512:,} tokens (linear)\n"
    )
    assert line in cases["logs"][0]
    assert all("power-lr: " not in log for log in cases["logs"][1:])


def parse(params, kind="PowerLR"):
    DeepSpeedConfig({"train_batch_size": 4, "scheduler": {"type": kind, "params": params}})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"scheduler.params.sequence_length is missing: .* tokens of a training sequence"),
        ({"sequence_lenght": 8}, r"sequence_lenght: unknown; did you mean 'sequence_length'"),
        ({"batch_size": 8}, r"scheduler.params.batch_size: unknown"),
        ({"sequence_length": "auto"}, r'params.sequence_length "auto": nothing filled it'),
        ({"sequence_length": 8, "a": "auto"}, r'params.a "auto": nothing filled it'),
        ({"sequence_length": 8, "a": -1}, r"scheduler.params: power_lr.a .* -1: must be positive"),
        ({"sequence_length": 8, "min_lr": "1"}, r"params.min_lr '1': must be a number"),
        ({"sequence_length": 8, "min_lr": True}, r"params.min_lr True: must be a number"),
        ({"sequence_length": 8, "warmup_max_lr": [1, 2]}, r"warmup_max_lr \[1, 2\]: must be a num"),
        ({"sequence_length": 8, "warmup_max_lr": 0}, r"warmup_max_lr 0: must be positive"),
        ({"sequence_length": 8, "warmup_max_lr": 1, "min_lr": 2}, r"min_lr 2: must lie between"),
        ({"sequence_length": 8, "decay_style": "expo"}, r"decay_style .* 'expo': unknown"),
        (
            {"sequence_length": 8, "decay_num_steps": 2, "decay_tokens": 16},
            r"params: give decay_tokens or decay_num_steps, not both",
        ),
    ],
)
def test_wrong_parameters(params, message):
    with pytest.raises(ConfigError, match=message):
        parse(params)


def test_parameters_that_wait_for_trainer():
    waiting = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    parse({"sequence_length": 8, "decay_num_steps": 2, **dict.fromkeys(waiting, "auto")})


def test_schedulers_of_others_are_not_read():
    parse({"no": "auto"}, kind="WarmupLR")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], r"deepspeed_plugins \[\]: must be an object"),
        ({"power_lr": {}}, r"deepspeed_plugins.power_lr: it is turned on by `scheduler.type`"),
        ({"power_mup": {}}, r"deepspeed_plugins.power_mup: this version has no DeepSpeed adapter"),
        ({"nonsense": {}}, r"deepspeed_plugins: unknown key 'nonsense'"),
    ],
)
def test_section(section, message):
    with pytest.raises(ConfigError, match=message):
        DeepSpeedConfig({"train_batch_size": 4, "deepspeed_plugins": section})


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])


def test_groups_keep_their_proportions():
    sgd = optimizer(0.2, torch.tensor(0.1), 0.05)
    PowerLR(sgd, batch_size=4, sequence_length=8, warmup_max_lr=0.02)
    assert [float(group["lr"]) for group in sgd.param_groups] == pytest.approx([0.02, 0.01, 0.005])
    assert isinstance(sgd.param_groups[1]["lr"], torch.Tensor)
    sgd = optimizer(0.0, 0.0)
    PowerLR(sgd, batch_size=4, sequence_length=8, warmup_max_lr=0.02)
    assert [group["lr"] for group in sgd.param_groups] == [0.02, 0.02]


def test_built_by_hand():
    with pytest.raises(ConfigError, match="needs the batch size of a DeepSpeedEngine"):
        PowerLR(optimizer(0.1), sequence_length=8)
    with pytest.raises(ConfigError, match="no torch optimizer under object"):
        PowerLR(object(), batch_size=4, sequence_length=8)


def test_registered_once():
    import deepspeed

    register(deepspeed.runtime.lr_schedules)
    assert deepspeed.runtime.lr_schedules.PowerLR is PowerLR
    assert VALID_LR_SCHEDULES.count("PowerLR") == 1
