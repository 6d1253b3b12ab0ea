"""Power LR on Megatron's real OptimizerParamScheduler, step by step against the closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core import optimizer_param_scheduler as upstream

from megatron_plugins import power_lr
from tests.megatron.power_run import EIGHT_FROM, POWER, RAMP, STYLE, TWELVE_FROM, Run, reset
from torch_plugins.config import ConfigError
from torch_plugins.config import PowerLR as Power
from torch_plugins.power_lr import Schedule

BATCH = 8 * 32
"""Tokens of a batch of TINY, which trains 20 of them."""


@pytest.fixture
def run_of() -> Iterator[Callable[..., Run]]:
    yield Run
    reset()


CASES = {
    "plain": ([], Schedule(Power(a=1), 5e-3)),
    "warm-up": (["--lr-warmup-iters", 3], Schedule(Power(a=1), 5e-3, 3 * BATCH)),
    "warm-up fraction": (["--lr-warmup-fraction", 0.33], Schedule(Power(a=1), 5e-3, 6.6 * BATCH)),
    "warm-up init": (
        ["--lr-warmup-iters", 3, "--lr-warmup-init", 1e-3],
        Schedule(Power(a=1), 5e-3, 3 * BATCH, init_lr=1e-3),
    ),
    "exponent": (["--power-lr-b", -0.3, "--power-lr-a", 0.3], Schedule(Power(0.3, -0.3), 5e-3)),
    "minimum": (["--min-lr", 1e-3], Schedule(Power(a=1), 5e-3, min_lr=1e-3)),
    "last phase": (
        ["--lr-warmup-iters", 2, "--power-lr-decay-tokens", 1000, "--min-lr", 1e-4],
        Schedule(Power(1, decay_tokens=1000), 5e-3, 2 * BATCH, 20 * BATCH, 1e-4),
    ),
    "in iterations, before the end": (
        ["--lr-wsd-decay-iters", 4, "--lr-decay-iters", 15, "--power-lr-decay-style", "cosine"],
        Schedule(Power(1, decay_tokens=4 * BATCH, decay_style="cosine"), 5e-3, 0, 15 * BATCH),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_are_the_closed_form(run_of: Callable[..., Run], name: str) -> None:
    """At every iteration and past the end, for every kind of parameter group."""
    flags, schedule = CASES[name]
    run = run_of(*POWER, *flags)
    for tokens, batch, rates in run.train(25):
        assert batch == BATCH
        assert rates == closed_form(schedule, tokens, batch)


def closed_form(schedule: Schedule, tokens: int, batch: int) -> list[float]:
    """Rates of the groups of a :class:`Run`."""
    low = schedule.min_lr
    groups = ((1, low), (1 / 9, low / 9), (3, 2e-4), (1, low))
    rates = [float(schedule.rate(tokens, batch, ratio, floor)) for ratio, floor in groups]
    return [pytest.approx(rate, rel=1e-12, abs=0) for rate in rates]


def test_the_batch_of_the_moment(run_of: Callable[..., Run]) -> None:
    """While it ramps up from 4 to 8 and 12, each iteration's rate has that iteration's batch."""
    flags = ["--train-samples", 240, "--lr-warmup-samples", 9, "--lr-wsd-decay-samples", 60]
    run = run_of(*POWER, *RAMP, *flags)
    schedule = Schedule(Power(1, decay_tokens=60 * 32), 5e-3, 9 * 32, 240 * 32)
    for tokens, batch, rates in run.train(28):
        assert batch == 32 * (4 if tokens < EIGHT_FROM else 8 if tokens < TWELVE_FROM else 12)
        assert rates == closed_form(schedule, tokens, batch)
    assert tokens > 240 * 32


def test_skipped_iterations_move_the_batch_and_not_the_tokens(run_of: Callable[..., Run]) -> None:
    run = run_of(*POWER, *RAMP, "--train-samples", 240)
    list(run.train(3))
    run.args.consumed_train_samples += TWELVE_FROM // 32  # as --iterations-to-skip does

    def step(*args: object) -> None:
        for _, batch, rates in run.train(3):
            tokens = 32 * run.scheduler.num_steps
            assert (tokens >= 3 * 4 * 32, batch) == (True, 12 * 32)
            assert rates == closed_form(Schedule(Power(a=1), 5e-3), tokens, batch)

    power_lr.train_step(step, None, None, None, run.optimizer, run.scheduler)
    assert run.scheduler.num_steps == 3 * 4 + 3 * 12


def test_golden_values(run_of: Callable[..., Run]) -> None:
    """The paper's run: 1,024 sequences of 4,096 tokens, eta_max 0.02, a 4, b -0.51."""
    long = ["--seq-length", 4096, "--max-position-embeddings", 4096, "--global-batch-size", 1024]
    run = run_of(*STYLE, "--lr", 0.02, *long, "--train-iters", 700_000)
    for tokens, rate in ((1e9, 0.02), (1e11, 1.00545e-2), (1e12, 3.10713e-3), (2.5e12, 1.9472e-3)):
        run.scheduler.step(round(tokens / 4096) - run.scheduler.num_steps)
        assert run.rates[0] == pytest.approx(rate, rel=5e-6)


def test_the_horizon_plays_no_part_before_the_last_phase(run_of: Callable[..., Run]) -> None:
    short = list(run_of(*POWER, "--train-iters", 10).train(30))
    assert short == list(run_of(*POWER, "--train-iters", 3000).train(30))
    decays = ("--lr-wsd-decay-iters", 5)
    assert short[:26] == list(run_of(*POWER, "--train-iters", 30, *decays).train(26))


@pytest.mark.parametrize("style", ["constant", "cosine", "WSD"])
def test_other_styles_are_untouched(run_of: Callable[..., Run], style: str) -> None:
    run = run_of("--lr-decay-style", style, "--lr-wsd-decay-iters", 5, "--lr-warmup-iters", 2)
    scheduler_class = upstream.OptimizerParamScheduler
    for _, _, rates in run.train(25):
        groups = run.optimizer.param_groups
        assert rates == [scheduler_class.get_lr.__wrapped__(run.scheduler, g) for g in groups]
    state = run.scheduler.state_dict()
    assert state == scheduler_class.state_dict.__wrapped__(run.scheduler)
    assert "power_lr" not in vars(run.scheduler)
    again = run_of("--lr-decay-style", style, "--lr-wsd-decay-iters", 5, "--lr-warmup-iters", 2)
    again.scheduler.load_state_dict(state)
    assert again.rates == run.rates


def test_rates_in_tensors_and_the_log(run_of: Callable[..., Run]) -> None:
    run = run_of(*POWER)
    group = run.optimizer.param_groups[0]
    group["lr"] = kept = torch.zeros(())
    run.scheduler.step(80)
    rate = float(Schedule(Power(a=1), 5e-3).rate(80 * 32, BATCH))
    assert kept.item() == pytest.approx(rate)
    assert upstream.get_canonical_lr_for_logging(run.optimizer.param_groups) is kept


LAST = ("--power-lr-decay-tokens", 1000)
OVERRIDE, CHECKPOINT = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


def saved(run: Run, iterations: int) -> dict[str, object]:
    list(run.train(iterations))
    return run.scheduler.state_dict()


def rest(run: Run, state: dict[str, object], iterations: int = 8) -> list[object]:
    """What a resumed run trains."""
    run.scheduler.load_state_dict(dict(state))
    run.args.consumed_train_samples = run.scheduler.num_steps
    return list(run.train(iterations))


@pytest.mark.parametrize("at", [1, 8, 18], ids=["warm-up", "power", "last phase"])
@pytest.mark.parametrize("choice", [(), (OVERRIDE,), (CHECKPOINT,)])
def test_resume(run_of: Callable[..., Run], at: int, choice: tuple[str, ...]) -> None:
    flags = (*POWER, *LAST, "--lr-warmup-iters", 3)
    straight = list(run_of(*flags).train(at + 8))
    state = saved(run_of(*flags), at)
    assert rest(run_of(*flags, *choice), state) == straight[at:]


@pytest.mark.parametrize(
    ("flag", "value", "theirs"),
    [
        ("--power-lr-a", 2, "1.0"),
        ("--power-lr-b", -0.4, "-0.51"),
        ("--power-lr-decay-tokens", 999, "1000"),
        ("--power-lr-decay-style", "linear", "exponential"),
    ],
)
def test_a_changed_setting_is_told_unless_decided(
    run_of: Callable[..., Run], flag: str, value: object, theirs: str
) -> None:
    state = saved(run_of(*POWER, *LAST), 18)
    theirs_on, mine_on = (
        list(run_of(*POWER, *LAST, *more).train(26))[18:] for more in ((), (flag, value))
    )
    changed = (*POWER, *LAST, flag, value)
    with pytest.raises(ConfigError, match=f"{flag} is {value}.* and {theirs} in the checkpoint.*"):
        rest(run_of(*changed), state)
    assert rest(run_of(*changed, OVERRIDE), state) == mine_on != theirs_on
    assert rest(run_of(*changed, CHECKPOINT), state) == theirs_on


@pytest.mark.parametrize(
    ("flags", "name"),
    [(("--lr", 6e-3), "learning rate"), (("--lr-warmup-iters", 2), "warmup iterations")],
)
def test_upstreams_own_checks_stay(
    run_of: Callable[..., Run], flags: tuple[object, ...], name: str
) -> None:
    state = saved(run_of(*POWER), 4)
    with pytest.raises(AssertionError, match=name):
        rest(run_of(*POWER, *flags), state)
    ends = saved(run_of(*POWER, *LAST), 4)
    with pytest.raises(AssertionError, match="total number of iterations"):
        rest(run_of(*POWER, *LAST, "--train-iters", 40), ends)
    increments = ("--weight-decay-incr-style", "linear", "--start-weight-decay", 0)
    increments += ("--end-weight-decay", 0.1)
    ends = saved(run_of(*POWER, *increments), 4)
    with pytest.raises(AssertionError, match="weight decay iterations"):
        rest(run_of(*POWER, *increments, "--train-iters", 40), ends)


def test_extending_a_finished_run_is_the_longer_run(run_of: Callable[..., Run]) -> None:
    state = saved(run_of(*POWER), 20)
    longer = (*POWER, "--train-iters", 40)
    assert rest(run_of(*longer), state, 20) == list(run_of(*longer).train(40))[20:]
    with pytest.raises(ConfigError, match=r"--power-lr-decay-tokens is 1000 .*--override-opt"):
        rest(run_of(*longer, *LAST), state)
    straight = list(run_of(*longer, *LAST).train(40))
    assert rest(run_of(*longer, *LAST, OVERRIDE), state, 20) == straight[20:]


def test_other_styles_in_the_checkpoint(run_of: Callable[..., Run]) -> None:
    cosine = ("--lr-decay-style", "cosine", "--lr", "5e-3")
    power_on, cosine_on = (list(run_of(*flags).train(13))[5:] for flags in (POWER, cosine))
    for saving, loading, expected in ((cosine, POWER, power_on), (POWER, cosine, cosine_on)):
        state = saved(run_of(*saving), 5)
        with pytest.raises(AssertionError, match="learning rate decay style"):
            rest(run_of(*loading), state)
        assert rest(run_of(*loading, OVERRIDE), state) == expected
        theirs = cosine_on if expected is power_on else power_on
        assert rest(run_of(*loading, CHECKPOINT), state) == theirs


def test_another_peak_with_the_optimizers_old_groups(run_of: Callable[..., Run]) -> None:
    """Megatron before 0.19 restores the groups' rates, and the scheduler has the new ones."""
    state = saved(run_of(*POWER), 2)
    run = run_of(*POWER, "--lr", 4e-3, OVERRIDE)
    for group, old in zip(run.optimizer.param_groups, (5e-3, 5e-3 / 9, 15e-3), strict=False):
        group["max_lr"] = old
    for tokens, batch, rates in rest(run, state):
        assert rates == closed_form(Schedule(Power(a=1), 4e-3), tokens, batch)


def test_another_sequence_length_goes_on_at_the_same_token(run_of: Callable[..., Run]) -> None:
    state = saved(run_of(*POWER, "--lr-warmup-iters", 3), 10)
    longer = ("--seq-length", 128, "--max-position-embeddings", 128, "--lr-warmup-iters", 3)
    run = run_of(*POWER, *longer)
    run.scheduler.load_state_dict(state)
    schedule = Schedule(Power(a=1), 5e-3)
    for more in range(3):
        tokens = 10 * BATCH + more * 4 * BATCH
        assert run.rates == closed_form(schedule, tokens, 4 * BATCH)
        assert run.scheduler.state_dict()["power_lr"]["tokens"] == tokens
        run.scheduler.step(8)


def test_without_a_training_there_are_no_settings() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    with pytest.raises(ConfigError, match="arguments of Megatron's training loop"):
        upstream.OptimizerParamScheduler(
            optimizer, 0.0, 1e-3, 0.0, 0, 10, "power", 0.0, 0.0, 10, "constant"
        )


def test_describe(run_of: Callable[..., Run]) -> None:
    run = run_of(*POWER, *LAST)
    text = power_lr.describe(Power(), run.args, (None, None, run.scheduler))
    assert text == (
        "peak 0.005, a 1, b -0.51, 8 sequences of 32 tokens, decays over the last 1,000 tokens "
        "(exponential)"
    )
    del run.scheduler.power_lr
    with pytest.raises(ConfigError, match="a get_lr of its own"):
        power_lr.describe(Power(), run.args, (None, None, run.scheduler))
    run.scheduler.lr_decay_style = "cosine"
    told = power_lr.describe(Power(), run.args, (None, None, run.scheduler))
    assert "decay style cosine counts" in told
