"""``PowerLR`` as a torch scheduler: every step is the closed form, whatever happens between."""

import io
import json
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from torch_plugins.config import ConfigError
from torch_plugins.config import PowerLR as Power
from torch_plugins.power_lr import PowerLR, Schedule

SEQUENCE = 512
SETTINGS = {
    "sequence_length": SEQUENCE,
    "warmup_tokens": 20_000,
    "total_tokens": 400_000,
    "decay_tokens": 100_000,
    "min_lr": 1e-5,
    "a": 0.3,
}
SCHEDULE = Schedule(Power(a=0.3, decay_tokens=100_000), 0.01, 20_000, 400_000, 1e-5)
"""What ``SETTINGS`` mean for an optimizer whose largest rate is 0.01."""
STEPS = 110
"""At 8 sequences a step: warm-up 5 steps, last phase from step 74, end at step 98."""

pytestmark = pytest.mark.filterwarnings("error")


def build(*lrs, kind=torch.optim.SGD):
    """An optimizer with one group per rate."""
    lrs = lrs or (0.01, 0.0025)
    return kind([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs])


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(scheduler, optimizer, steps=1):
    """Train so many steps; the rates each of them used."""
    used = []
    for _ in range(steps):
        used.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    return used


def closed_form(tokens, batch_size=8, schedule=SCHEDULE, ratios=(1, 0.25)):
    return [float(schedule.rate(tokens, batch_size * SEQUENCE, ratio)) for ratio in ratios]


@pytest.mark.parametrize("style", ["exponential", "linear"])
def test_every_step_is_the_closed_form(style):
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS, decay_style=style)
    schedule = replace(SCHEDULE, power=replace(SCHEDULE.power, decay_style=style))
    used = advance(scheduler, optimizer, STEPS)
    assert used == [closed_form(i * 8 * SEQUENCE, schedule=schedule) for i in range(STEPS)]
    assert scheduler.tokens == STEPS * 8 * SEQUENCE
    assert scheduler.get_last_lr() == rates(optimizer) == [1e-5, 0.25e-5]
    assert max(first for first, _ in used) < 0.01


def test_batch_size_ramps_up():
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=2, **SETTINGS)
    tokens, clipped = 0, 0
    for step in range(12):
        if step and step % 3 == 0:
            scheduler.set_batch_size(scheduler.batch_size + 80)
        expected = closed_form(tokens, scheduler.batch_size)
        assert advance(scheduler, optimizer) == [expected]
        tokens += scheduler.batch_size * SEQUENCE
        clipped += expected == [0.01, 0.0025]
    assert scheduler.tokens == tokens > SCHEDULE.total_tokens
    assert clipped == 3


@pytest.mark.parametrize("stop", [3, 40, 90], ids=["warm-up", "power", "last phase"])
@pytest.mark.parametrize("how", ["json", "torch.save", "pickle"])
def test_resume_mid_phase(stop, how):
    def through(state):
        if how == "json":
            return json.loads(json.dumps(state))
        if how == "pickle":
            return pickle.loads(pickle.dumps(state))
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    straight = build()
    expected = advance(PowerLR(straight, batch_size=8, **SETTINGS), straight, STEPS)

    first = build()
    scheduler = PowerLR(first, batch_size=8, **SETTINGS)
    used = advance(scheduler, first, stop)
    saved = through([first.state_dict(), scheduler.state_dict()])

    second = build()
    scheduler = PowerLR(second, batch_size=8, **SETTINGS)
    second.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert scheduler.get_last_lr() == rates(second)
    assert used + advance(scheduler, second, STEPS - stop) == expected


def test_resume_sets_the_rates_of_an_optimizer_that_was_not_saved():
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS)
    advance(scheduler, optimizer, 40)
    fresh = build()
    PowerLR(fresh, batch_size=8, **SETTINGS).load_state_dict(scheduler.state_dict())
    assert rates(fresh) == closed_form(40 * 8 * SEQUENCE)


def test_resume_after_the_optimizer_was_loaded():
    """The optimizer's rates are then those of the moment; its peaks stand in ``initial_lr``."""
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS)
    advance(scheduler, optimizer, 40)
    second = build()
    second.load_state_dict(optimizer.state_dict())
    resumed = PowerLR(second, batch_size=8, **SETTINGS)
    assert resumed.schedule.max_lr == 0.01
    resumed.load_state_dict(scheduler.state_dict())
    assert rates(second) == closed_form(40 * 8 * SEQUENCE)
    resumed.step()  # torch's warning of a first step before the optimizer's is for new runs
    assert rates(second) == closed_form(41 * 8 * SEQUENCE)


def test_extending_a_finished_run_reproduces_the_longer_one():
    optimizer, longer = build(), build()
    short = {**SETTINGS, "decay_tokens": 0, "total_tokens": None}
    extended = {**SETTINGS, "total_tokens": 800_000}
    expected = advance(PowerLR(longer, batch_size=8, **extended), longer, 200)

    scheduler = PowerLR(optimizer, batch_size=8, **short)
    used = advance(scheduler, optimizer, 100)
    second = PowerLR(optimizer, batch_size=8, **extended)
    with pytest.warns(UserWarning, match=r"total_tokens: saved None, now 800000") as caught:
        second.load_state_dict(scheduler.state_dict())
    assert "decay_tokens: saved 0, now 100000" in str(caught[0].message)
    assert "warmup" not in str(caught[0].message)
    assert used + advance(second, optimizer, 100) == expected


def test_ramped_batch_size_is_restored_and_a_new_one_is_kept():
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS)
    advance(scheduler, optimizer, 20)
    scheduler.set_batch_size(32)
    state, tokens = scheduler.state_dict(), 20 * 8 * SEQUENCE

    same = PowerLR(build(), batch_size=8, **SETTINGS)
    same.load_state_dict(state)
    assert same.get_last_lr() == closed_form(tokens, 32)

    other = PowerLR(build(), batch_size=16, **SETTINGS)
    with pytest.warns(UserWarning, match=r"settings: batch_size: saved 8, now 16$"):
        other.load_state_dict(state)
    assert other.get_last_lr() == closed_form(tokens, 16)


def test_state_of_another_scheduler():
    optimizer = build()
    state = ConstantLR(optimizer).state_dict()
    with pytest.raises(
        ConfigError, match=r"without tokens, .*settings: .* build PowerLR with last"
    ):
        PowerLR(optimizer, batch_size=8).load_state_dict(state)


def test_last_epoch_goes_on_without_a_state():
    optimizer = build()
    with pytest.raises(KeyError, match="initial_lr"):  # torch's own rule
        PowerLR(optimizer, batch_size=8, **SETTINGS, last_epoch=39)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS, last_epoch=39)
    assert (scheduler.last_epoch, scheduler.tokens) == (40, 40 * 8 * SEQUENCE)
    assert rates(optimizer) == closed_form(scheduler.tokens)
    optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):  # torch's, of its deprecated argument
        scheduler.step(90)
    assert rates(optimizer) == closed_form(90 * 8 * SEQUENCE)


def test_tensor_rates_are_changed_in_place():
    optimizer = build(torch.tensor(0.01), torch.tensor(0.0025), kind=torch.optim.Adam)
    held = [group["lr"] for group in optimizer.param_groups]
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS)
    advance(scheduler, optimizer, 40)
    scheduler.set_batch_size(16)
    assert all(a is group["lr"] for a, group in zip(held, optimizer.param_groups, strict=True))
    expected = closed_form(40 * 8 * SEQUENCE, 16)
    assert [float(lr) for lr in held] == pytest.approx(expected, rel=1e-6)
    scheduler.get_last_lr()[0].zero_()
    assert float(held[0]) > 0  # a copy was zeroed
    json.dumps(scheduler.state_dict())


def test_group_added_later_follows():
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS)
    advance(scheduler, optimizer, 40)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.005})
    advance(scheduler, optimizer)
    assert rates(optimizer) == closed_form(41 * 8 * SEQUENCE, ratios=(1, 0.25, 0.5))


def test_explicit_maximum_is_that_of_groups_elsewhere():
    """muP's hidden matrices in an optimizer of their own: clipped with the others, then divided."""
    optimizer = build(0.0025)
    scheduler = PowerLR(optimizer, batch_size=512, **SETTINGS, max_lr=0.01)
    advance(scheduler, optimizer, 1)
    assert rates(optimizer) == closed_form(512 * SEQUENCE, 512, ratios=(0.25,)) == [0.0025]


def test_skipped_steps_train_nothing():
    """GradScaler skips a step whose gradients overflow; the caller leaves the schedule alone."""
    optimizer = build()
    scheduler = PowerLR(optimizer, batch_size=8, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trained = 0
    for step in range(12):
        scaler.scale(sum(g["params"][0].sum() for g in optimizer.param_groups)).backward()
        if step in (0, 5):
            optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            scheduler.step()
            trained += 1
        optimizer.zero_grad()
    assert trained == 10
    assert rates(optimizer) == closed_form(10 * 8 * SEQUENCE)


def test_first_member_of_a_sequence():
    """As far as torch's wrappers go: the schedule first, another rule from a milestone on."""
    optimizer = build()
    power = PowerLR(optimizer, batch_size=8, **SETTINGS)
    sequence = SequentialLR(optimizer, [power, ConstantLR(optimizer, 0.5, 10)], milestones=[30])
    used = advance(sequence, optimizer, 32)
    assert used[:30] == [closed_form(i * 8 * SEQUENCE) for i in range(30)]
    assert used[30] == [0.005, 0.00125]


def test_settings_without_effect_on_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        scheduler = PowerLR(build(), batch_size=8)
        scheduler.get_lr()
        scheduler.load_state_dict(scheduler.state_dict())
    assert caught == []


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: must be an integer of at least 1"),
        ({"batch_size": 8.0}, "batch_size 8.0: must be an integer"),
        ({"batch_size": True}, "batch_size True: must be an integer"),
        ({"batch_size": 8, "sequence_length": "4096"}, "sequence_length '4096': must be an int"),
        ({"batch_size": 8, "min_lr": 1.0}, "min_lr 1.0: must lie between 0 and max_lr 0.01"),
        ({"batch_size": 8, "decay_tokens": 9}, "decay_tokens 9: .* give total_tokens"),
    ],
)
def test_wrong_arguments(keywords, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        PowerLR(build(), **keywords)


def test_wrong_batch_size_later():
    scheduler = PowerLR(build(), batch_size=8)
    with pytest.raises(ConfigError, match="batch_size -1: must be an integer of at least 1"):
        scheduler.set_batch_size(-1)
    with pytest.raises(TypeError, match="batch_size"):
        PowerLR(build())
