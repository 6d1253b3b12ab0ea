"""Megatron's scheduler for a command line, and what a training does with it, less the model."""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.training import arguments, global_vars, training

from tests.megatron.harness import TINY, without

STYLE = ("--lr-decay-style", "power")
POWER = (*STYLE, "--lr", "5e-3", "--power-lr-a", "1")
"""With batches of 8 x 32 tokens the clip ends after 141 tokens: 0.0625 * n ** -0.51 = 5e-3."""

RAMPS_IN_STEPS = hasattr(calculator, "StepBatchsizeNumMicroBatchesCalculator")
RAMP = (
    ("--step-batch-size-schedule", "0:4 640:8 1600:12")  # tokens
    if RAMPS_IN_STEPS
    else ("--rampup-batch-size", "4", "4", "48", "--global-batch-size", "12")  # samples
)
EIGHT_FROM, TWELVE_FROM = (640, 1600) if RAMPS_IN_STEPS else (768, 1536)
"""Tokens after which :data:`RAMP` has batches of 8 and of 12 sequences."""
RAMPING = without("--train-iters", "--global-batch-size")
"""TINY for a run with :data:`RAMP`, to be given ``--train-samples``."""


class Run:
    """A scheduler that Megatron built from a command line; :meth:`train` steps it as training does.

    ``groups``: the default parameter group, one of muP, a decoupled one, and one without rates of
    its own.
    """

    def __init__(self, *flags: object) -> None:
        self.args = copy.deepcopy(validated(*map(str, flags)))
        reset()
        global_vars.set_global_variables(self.args, build_tokenizer=False)
        lr, min_lr = self.args.lr, self.args.min_lr
        overrides: list[dict[str, Any]] = [
            {"default_config": True, "max_lr": lr, "min_lr": min_lr},
            {"default_config": False, "max_lr": lr / 9, "min_lr": min_lr / 9},
            {"default_config": False, "max_lr": lr * 3, "min_lr": 2e-4},
            {},
        ]
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], **more} for more in overrides]
        self.optimizer = torch.optim.SGD(groups, lr=0.0)
        self.scheduler = training.get_optimizer_param_scheduler(self.optimizer)

    @property
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def train(self, iterations: int) -> Iterator[tuple[int, int, list[float]]]:
        """Tokens trained, tokens of the batch and rates of every iteration, as it begins."""
        for _ in range(iterations):
            calculator.update_num_microbatches(self.args.consumed_train_samples, False)
            batch, length = calculator.get_current_global_batch_size(), self.args.seq_length
            yield self.scheduler.num_steps * length, batch * length, self.rates
            self.scheduler.step(batch)
            self.args.consumed_train_samples += batch


@cache
def validated(*flags: str) -> Namespace:
    """Megatron's arguments for TINY, or RAMPING, with ``flags``."""
    tiny = RAMPING if RAMP[0] in flags else TINY
    command = [*tiny, *flags, "--transformer-impl", "local"]
    args = parser().parse_args(command)
    args.rank, args.world_size = 0, 1  # parse_args reads them from the environment
    arguments.validate_args(args)
    return args


@cache
def parser() -> ArgumentParser:
    return arguments.add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def reset() -> None:
    """No training in this process."""
    calculator.unset_num_microbatches_calculator()
    global_vars.unset_global_variables()
