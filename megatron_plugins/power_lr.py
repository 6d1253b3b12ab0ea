"""Power LR as a decay style of Megatron's own scheduler: ``--lr-decay-style power``
(arXiv 2408.13359; formulas in :mod:`torch_plugins.power_lr`).

``OptimizerParamScheduler`` stays in charge, and only :func:`get_lr` has another formula:

===========  =====================================================================================
eta_max      ``--lr``
n            samples that the scheduler counted, times ``--seq-length``; padding counts
beta         the batch that upstream's calculator gives the next iteration, so also while it ramps
             up (``--rampup-batch-size`` in 0.17, ``--step-batch-size-schedule`` since)
N_warm       ``--lr-warmup-iters``, ``-samples`` or ``-fraction``, beginning at ``--lr-warmup-init``
N_decay      ``--power-lr-decay-tokens``, or Megatron's ``--lr-wsd-decay-iters`` or ``-samples``
N            ``--lr-decay-iters`` or ``-samples``, by default the end of training; only the last
             phase reads it, and after it the rate stays at ``--min-lr``
===========  =====================================================================================

A parameter group has ``max_lr / eta_max`` of the schedule, applied after the clip at eta_max, and
its own ``min_lr``: decoupled and muP groups keep their proportions at every n.

Resume. The checkpoint holds a, b, the last phase and n itself, so a run may go on with another
sequence length. A setting that differs from the checkpoint's is an error, as for upstream's styles,
unless ``--override-opt-param-scheduler`` (the flags count) or
``--use-checkpoint-opt-param-scheduler`` (the checkpoint counts). Without a last phase a longer
``--train-iters`` changes no rate, and needs neither; to *add* a last phase give
``--override-opt-param-scheduler``, and to extend a run that has ended in one, go back to the
checkpoint before it. ``--use-checkpoint-args`` restores no option of a scheduler in upstream, hence
none here, and ``--finetune`` begins at n = 0.

Not supported: ``OptimizerParamScheduler`` outside Megatron's training loop, which has no flags.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_plugins import arguments
from megatron_plugins.refusals import Refusal
from megatron_plugins.seams import doors
from torch_plugins.config import ConfigError, PowerLR
from torch_plugins.power_lr import Schedule

STYLE = "power"
_SAVED = "power_lr"
"""Key of the settings in the scheduler's state."""


@dataclass
class Settings:
    """What the Power style needs beside the scheduler's own attributes; it hangs on the scheduler
    as ``power_lr``."""

    power: PowerLR
    """With the length of the last phase in tokens, in whatever unit it was given."""
    sequence_length: int
    shift: int = 0
    """Tokens trained minus samples times ``sequence_length``: 0 unless the length has changed."""
    skipped: int = 0
    """Samples consumed without a step: upstream's batch size follows the consumed ones."""

    def tokens(self, samples: float) -> float:
        """n after ``samples`` samples."""
        return samples * self.sequence_length + self.shift

    def schedule(self, scheduler: Any) -> Schedule:
        """The closed form with the scheduler's values, which a checkpoint may have set."""
        return Schedule(
            self.power,
            max_lr=scheduler.max_lr,
            warmup_tokens=max(self.tokens(scheduler.lr_warmup_steps), 0),
            total_tokens=self.tokens(scheduler.lr_decay_steps),
            min_lr=scheduler.min_lr,
            init_lr=scheduler.init_lr,
        )


def settings(scheduler: Any) -> Settings:
    """The scheduler's settings; the first time, from the run's arguments.

    Raises:
        ConfigError: there are no arguments.
    """
    if _SAVED not in vars(scheduler):
        args = doors.megatron_args()
        if args is None:
            raise ConfigError(
                f"lr_decay_style {STYLE!r}: OptimizerParamScheduler finds its settings in the "
                f"arguments of Megatron's training loop ({PowerLR.flag()}), and there are none"
            )
        power = arguments.features_of(args).get(PowerLR.key(), PowerLR())
        length = args.seq_length
        if scheduler.wsd_decay_steps and not power.decay_tokens:
            power = replace(power, decay_tokens=scheduler.wsd_decay_steps * length)
        scheduler.power_lr = Settings(power, length)
    return scheduler.power_lr


def get_lr(original: Callable[..., float], scheduler: Any, param_group: dict[str, Any]) -> float:
    """Wrap of ``OptimizerParamScheduler.get_lr``: the rate of one parameter group."""
    if scheduler.lr_decay_style != STYLE:
        return original(scheduler, param_group)
    run, peak = settings(scheduler), _peak_of_groups(scheduler)
    return _rate(
        run.schedule(scheduler),
        run.tokens(scheduler.num_steps),
        batch_size(scheduler.num_steps + run.skipped) * run.sequence_length,
        param_group.get("max_lr", peak) / peak,
        param_group.get("min_lr", scheduler.min_lr),
    )


@lru_cache(maxsize=128)
def _rate(
    schedule: Schedule, tokens: float, batch_tokens: float, ratio: float, min_lr: float
) -> float:
    return float(schedule.rate(tokens, batch_tokens, ratio, min_lr))


def _peak_of_groups(scheduler: Any) -> float:
    """The ``--lr`` that the groups' ``max_lr`` belong to.

    Megatron before 0.19 restores them with the optimizer, also where
    ``--override-opt-param-scheduler`` gives the scheduler another ``--lr``.
    """
    for group in scheduler.optimizer.param_groups:
        if group.get("default_config"):
            return group.get("max_lr", scheduler.max_lr)
    return scheduler.max_lr


def batch_size(samples: int) -> int:
    """Global batch in sequences, as upstream's calculator will have it after ``samples``.

    Upstream steps the scheduler before it updates the calculator for the next iteration.
    """
    from megatron.core import num_microbatches_calculator

    calculator = copy.copy(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    calculator.update(samples, consistency_check=False)
    return calculator.get_current_running_global_batch_size()


def train_step(
    original: Callable[..., Any],
    forward_step_func: Any,
    data_iterator: Any,
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wrap of ``train_step``: the batch at hand decides, also after skipped iterations."""
    if getattr(opt_param_scheduler, "lr_decay_style", None) == STYLE:
        consumed = doors.megatron_args().consumed_train_samples
        settings(opt_param_scheduler).skipped = consumed - opt_param_scheduler.num_steps
        opt_param_scheduler.step(0)
    return original(
        forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs
    )


def state_dict(original: Callable[..., dict[str, Any]], scheduler: Any) -> dict[str, Any]:
    """Wrap of ``OptimizerParamScheduler.state_dict``: with the settings, and n itself."""
    state = original(scheduler)
    if scheduler.lr_decay_style == STYLE:
        run = settings(scheduler)
        state[_SAVED] = {**run.power.to_dict(), "tokens": run.tokens(scheduler.num_steps)}
    return state


def load_state_dict(
    original: Callable[..., None], scheduler: Any, state_dict: dict[str, Any]
) -> None:
    """Wrap of ``OptimizerParamScheduler.load_state_dict``; a change of the decay style itself is
    left to upstream.

    Raises:
        ConfigError: a setting differs from the checkpoint's, and nothing says which one counts.
    """
    saved = state_dict.get(_SAVED)
    mine, use_theirs = scheduler.lr_decay_style, scheduler.use_checkpoint_opt_param_scheduler
    if saved is not None and (mine == STYLE or use_theirs):
        run, saved = settings(scheduler), dict(saved)
        run.shift = saved.pop("tokens") - state_dict["num_steps"] * run.sequence_length
        run.power = PowerLR(
            **{name: _check_and_set(scheduler, name, value) for name, value in saved.items()}
        )
        state_dict = _without_horizon(scheduler, state_dict)
    original(scheduler, state_dict)


def _check_and_set(scheduler: Any, name: str, theirs: Any) -> Any:
    """One setting, by upstream's rules."""
    mine, flag = getattr(settings(scheduler).power, name), PowerLR.flag(name)
    decided = scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler
    if mine != theirs and not decided:
        raise ConfigError(
            f"{flag} is {mine} in this run and {theirs} in the checkpoint: give {flag} {theirs}, "
            f"or --override-opt-param-scheduler to go on with {mine}, or "
            "--use-checkpoint-opt-param-scheduler to go on with every setting of the checkpoint"
        )
    return scheduler._check_and_set(mine, theirs, flag)


def _without_horizon(scheduler: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with those ends of the run that no rate and no weight decay depends on replaced by
    this run's, so that upstream's check of them passes."""
    ends = []
    if not settings(scheduler).power.decay_tokens:
        ends.append("lr_decay_steps")
    if scheduler.wd_incr_style == state_dict.get("wd_incr_style") == "constant":
        ends.append("wd_incr_steps")
    return {**state_dict, **{name: getattr(scheduler, name) for name in ends}}


def describe(feature: PowerLR, args: Namespace, built: Any) -> str:
    """The schedule that the built scheduler really follows.

    Raises:
        ConfigError: its rates were computed by something else.
    """
    scheduler = built[2]
    if scheduler is None:
        return "no optimizer, so no rates"
    if scheduler.lr_decay_style != STYLE:
        return (
            f"off, the checkpoint's decay style {scheduler.lr_decay_style} counts "
            "(--use-checkpoint-opt-param-scheduler)"
        )
    run = vars(scheduler).get(_SAVED)
    if run is None:
        raise ConfigError(
            f"{feature.flag()} is on, but {type(scheduler).__name__} computed its rates by a "
            "get_lr of its own. Drop the flag, or run python -m megatron_plugins.doctor"
        )
    power, batch = run.power, batch_size(scheduler.num_steps + run.skipped)
    text = (
        f"peak {scheduler.max_lr:g}, a {power.a:g}, b {power.b:g}, "
        f"{batch:,} sequences of {run.sequence_length:,} tokens"
    )
    if power.decay_tokens:
        text += f", decays over the last {power.decay_tokens:,} tokens ({power.decay_style})"
    return text


def validate(args: Namespace, feature: PowerLR) -> None:
    """Check the rates' flags against each other, before anything is built.

    Raises:
        ConfigError: names the flags.
    """
    flag, tokens = feature.flag(), feature.flag("decay_tokens")
    if args.skip_train:  # builds no optimizer
        return
    if not args.lr:
        raise ConfigError(f"{flag} needs --lr, the peak of the schedule; the paper uses 0.02")
    unit, other = ("iters", "samples") if args.train_iters else ("samples", "iters")
    if (wrong := getattr(args, f"lr_wsd_decay_{other}")) is not None:
        raise ConfigError(
            f"--lr-wsd-decay-{other} {wrong} with --train-{unit}: give {tokens}, or "
            f"--lr-wsd-decay-{unit}"
        )
    wsd = getattr(args, f"lr_wsd_decay_{unit}")
    if wsd is not None and feature.decay_tokens:
        raise ConfigError(
            f"{tokens} {feature.decay_tokens} and --lr-wsd-decay-{unit} {wsd}: both give the "
            "length of the last phase; drop one"
        )
    if args.lr_wsd_decay_style != "exponential":  # upstream's default
        style = feature.flag("decay_style")
        raise ConfigError(
            f"--lr-wsd-decay-style {args.lr_wsd_decay_style} is the WSD style's: give {style}, "
            "whose megatron-exponential is Megatron's exponential"
        )
    _check_phases(args, feature, unit, wsd or 0)


def _check_phases(args: Namespace, feature: PowerLR, unit: str, wsd: int) -> None:
    """Warm-up and last phase must fit into the run."""
    samples = args.global_batch_size if unit == "iters" else 1
    total = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    if not total:  # upstream asks for it
        return
    fraction, warmup = args.lr_warmup_fraction, getattr(args, f"lr_warmup_{unit}")
    typed = f"--lr-warmup-{unit} {warmup}"
    if fraction is not None:
        typed, warmup = f"--lr-warmup-fraction {fraction}", fraction * total
    decay = feature.decay_tokens / args.seq_length / samples or wsd
    if decay:
        flag = f"{feature.flag('decay_tokens')} {feature.decay_tokens}"
        typed += f" and {flag if feature.decay_tokens else f'--lr-wsd-decay-{unit} {wsd}'}"
    if warmup >= total or warmup + decay > total:
        raise ConfigError(
            f"{typed} must fit into the run of {total * samples * args.seq_length:,} tokens "
            f"({total:,} {unit}): shorten the phases, or train longer with --train-{unit}"
        )


def adjust_config(config: Any, feature: PowerLR) -> None:
    """The model stays as it is."""


def _ramps(args: Namespace) -> bool:
    return getattr(args, "step_batch_size_schedule", None) is not None


REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "--perform-rl-step",
        lambda args: args.perform_rl_step,
        "a step trains rollouts, whose tokens are not samples times --seq-length",
    ),
    Refusal(
        "--hybrid-context-parallel",
        lambda args: args.hybrid_context_parallel,
        "its samples have any length, so their number does not tell the tokens",
    ),
    Refusal(
        "--step-batch-size-schedule and --train-iters",
        lambda args: _ramps(args) and bool(args.train_iters),
        "Megatron counts warm-up and decay iterations as if each had the smallest possible batch; "
        "give --train-samples and the phases in samples",
    ),
    Refusal(
        "--rampup-batch-size",
        lambda args: (
            args.rampup_batch_size is not None and hasattr(args, "step_batch_size_schedule")
        ),
        "this Megatron ignores it and trains the whole batch from the start; give "
        "--step-batch-size-schedule",
    ),
)
