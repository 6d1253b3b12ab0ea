"""Power LR on Megatron: whole trainings, and the flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing

from megatron_plugins.power_lr import REFUSED
from megatron_plugins.refusals import refuse
from tests.megatron import power_run
from tests.megatron.harness import Run, train
from tests.megatron.power_run import EIGHT_FROM, POWER, RAMP, RAMPING, STYLE, TWELVE_FROM
from torch_plugins.config import ConfigError, PowerLR
from torch_plugins.power_lr import Schedule

TO_THE_END = ("--exit-interval", 1000)


def test_a_training_that_ramps_up_and_skips(tmp_path: Path) -> None:
    """Rates in the log and in the optimizer are the closed form, of every iteration's own batch.

    The fifth iteration, the last one of 4 sequences, is skipped: its tokens do not count.
    """
    phases = ("--train-samples", 160, "--lr-warmup-samples", 10, "--lr-wsd-decay-samples", 50)
    decoupled = ("--decoupled-lr", 1e-2, "--untie-embeddings-and-output-weights")
    flags = (*POWER, *RAMP, *phases, *decoupled, "--iterations-to-skip", 5, "--save", tmp_path)
    run = train(*flags, *TO_THE_END, tiny=RAMPING)
    schedule = Schedule(PowerLR(1, decay_tokens=50 * 32), 5e-3, 10 * 32, 160 * 32)
    expected, consumed, trained = {}, 0, 0
    for iteration in range(1, 19):
        batch = batch_at(consumed)
        consumed += batch
        if iteration != 5:
            trained += batch
            expected[iteration] = float(schedule.rate(trained * 32, batch_at(consumed) * 32))
    assert rates(run) == pytest.approx(expected, rel=1e-12)
    printed = [float(text) for text in re.findall(r"learning rate: (\S+)", run.output)]
    assert printed == pytest.approx(list(expected.values()), rel=1e-6)  # through fp32
    assert "power-lr: peak 0.005, a 1, b -0.51, 4 sequences of 32 tokens, decays" in run.output

    state = dist_checkpointing.load_common_state_dict(str(tmp_path / "iter_0000018"))
    last = rates(run)[18]
    groups = {(g["max_lr"], g["lr"]) for g in state["optimizer"]["param_groups"]}
    assert groups == {(5e-3, last), (1e-2, 2 * last)}


def batch_at(samples: int) -> int:
    return 4 if samples * 32 < EIGHT_FROM else 8 if samples * 32 < TWELVE_FROM else 12


def rates(run: Run) -> dict[int, float]:
    """Learning rate after each iteration."""
    return {int(line["iteration"]): line["learning_rate"] for line in run.iterations}


PARALLEL = ("--tensor-model-parallel-size", 2, "--use-distributed-optimizer", "--bf16", *TO_THE_END)
LONG = (*POWER, "--lr-warmup-iters", 3, *PARALLEL, "--train-iters", 12)
LAST = ("--power-lr-decay-tokens", 4 * 256)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


@pytest.fixture(scope="module")
def straight(saved: Path) -> Run:
    """Twelve iterations, saved after each: warm-up to the third, last phase from the eighth."""
    return train(*LONG, *LAST, "--save", saved, "--save-interval", 1, processes=2)


def assert_goes_on(resumed: Run, straight: Run, after: int) -> None:
    """``resumed`` is bitwise the rest of ``straight``.

    Megatron keeps the resumed iteration's loss in its first average, so only the last one counts.
    """
    assert rates(resumed) == {i: rate for i, rate in rates(straight).items() if i > after}
    assert resumed.grad_norms == {i: norm for i, norm in straight.grad_norms.items() if i > after}
    assert resumed.losses[12] == straight.losses[12]


@pytest.mark.parametrize("after", [2, 6, 10], ids=["warm-up", "power", "last phase"])
def test_resume_equals_the_straight_run(saved: Path, straight: Run, after: int) -> None:
    resumed = train(*LONG, *LAST, "--load", saved, "--ckpt-step", after, processes=2)
    assert_goes_on(resumed, straight, after)


def test_extending_a_finished_run_reproduces_the_longer_run(tmp_path: Path, straight: Run) -> None:
    """A run of six iterations without a last phase goes on to twelve with one."""
    finished = train(*LONG, "--train-iters", 6, "--save", tmp_path, processes=2)
    assert rates(finished) == {i: rate for i, rate in rates(straight).items() if i <= 6}
    more = ("--override-opt-param-scheduler", "--use-checkpoint-args", "--load", tmp_path)
    extended = train(*LONG, *LAST, *more, processes=2)
    assert_goes_on(extended, straight, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*STYLE, "--lr", 0), "power needs --lr"),
        ((*POWER, "--power-lr-a", 0), "--power-lr-a"),
        ((*POWER, "--power-lr-b", 0.51), "--power-lr-b"),
        ((*POWER, *LAST, "--lr-wsd-decay-iters", 3), "1024 and --lr-wsd-decay-iters 3: both"),
        ((*POWER, "--lr-wsd-decay-samples", 3), "--lr-wsd-decay-samples 3 with --train-iters"),
        ((*POWER, "--lr-wsd-decay-style", "linear"), "give --power-lr-decay-style"),
        ((*POWER, "--power-lr-decay-tokens", "1e6"), "--power-lr-decay-tokens 1000000 must fit"),
        ((*POWER, "--lr-warmup-iters", 18, *LAST), "18 and --power-lr-decay-tokens 1024 must fit"),
        ((*POWER, "--lr-wsd-decay-iters", 21), "and --lr-wsd-decay-iters 21 must fit into"),
        ((*POWER, "--lr-warmup-iters", 20), r"20 must fit into the run of 5,120 tokens \(20 iters"),
        ((*POWER, "--lr-warmup-fraction", 0.9, *LAST), "--lr-warmup-fraction 0.9 and "),
        ((*POWER, *LAST, "--lr-decay-iters", 4, "--lr-warmup-iters", 1), r"\(4 iters\)"),
        ((*POWER, *RAMP, "--train-samples", 9, "--lr-warmup-samples", 9), r"288 tokens \(9 samp"),
        (("--power-lr-a", 4), "does nothing without --lr-decay-style power"),
    ],
)
def test_wrong_flags(flags: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        power_run.validated(*map(str, flags))


def test_a_run_without_optimizer_needs_no_rate() -> None:
    assert power_run.validated(*STYLE, "--skip-train", "--lr-wsd-decay-iters", "99").skip_train


TYPED = {
    "--perform-rl-step": ("--perform-rl-step",),
    "--hybrid-context-parallel": ("--hybrid-context-parallel",),
    "--step-batch-size-schedule and --train-iters": ("--step-batch-size-schedule", "0:4"),
    "--rampup-batch-size": ("--rampup-batch-size", "4", "4", "24", "--train-iters", "0"),
}


def test_the_table_of_refusals_is_covered() -> None:
    assert {row.flag for row in REFUSED} == TYPED.keys()


@pytest.mark.parametrize("flag", TYPED)
def test_refused(flag: str) -> None:
    typed = (*STYLE, "--train-iters", "5", *TYPED[flag])
    if flag.endswith(("batch-size", "train-iters")) and not power_run.RAMPS_IN_STEPS:
        pytest.skip("this Megatron ramps the batch up by --rampup-batch-size")
    with pytest.raises(ConfigError) as error:
        refuse(power_run.parser().parse_args(typed), " ".join(STYLE), REFUSED)
    assert f"--lr-decay-style power with {flag}: " in str(error.value)
    assert str(error.value).count("power with") == 1
