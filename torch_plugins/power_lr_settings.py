"""Power LR's settings as DeepSpeed's JSON and Hugging Face's ``lr_scheduler_kwargs`` spell them.

A phase is given in tokens (``warmup_tokens``, ``total_tokens``, ``decay_tokens``) or in optimizer
steps (``..._num_steps``). Steps become tokens once, with the batch size at the start: a run whose
batch size changes, or that goes on with another one, should use tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch

from torch_plugins.config import ConfigError, did_you_mean
from torch_plugins.config import PowerLR as PowerLRConfig
from torch_plugins.power_lr import PowerLR, Schedule

PHASES = ("warmup", "total", "decay")


@dataclass(frozen=True)
class Settings:
    """What a user may set; the batch size comes from the host."""

    sequence_length: int | None = None
    """Required: neither DeepSpeed nor Trainer knows it."""
    a: float = 4.0
    b: float = -0.51
    warmup_min_lr: float = 0.0
    """Rate at the first token of the warm-up."""
    warmup_max_lr: float | None = None
    """eta_max; default: the largest ``lr`` of the optimizer."""
    min_lr: float = 0.0
    warmup_tokens: float | None = None
    warmup_num_steps: float | None = None
    total_tokens: float | None = None
    total_num_steps: float | None = None
    decay_tokens: float | None = None
    decay_num_steps: float | None = None
    decay_style: str = "exponential"

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> Settings:
        """Check names and types, and what depends on neither batch size nor optimizer.

        Args:
            where: the place of the settings, for errors.

        Raises:
            ConfigError: an unknown name, ``"auto"`` that nothing filled, a value of the wrong kind,
                a phase given twice, no ``sequence_length``.
        """
        known = [item.name for item in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"{where}.{name}: unknown{did_you_mean(name, known)}")
            if value == "auto":
                raise ConfigError(f'{where}.{name} "auto": nothing filled it; give a value')
            number = isinstance(value, Real) and math.isfinite(value) and value is not True
            if name != "decay_style" and value is not None and not number:
                raise ConfigError(f"{where}.{name} {value!r}: must be a number")
        settings = cls(**given)
        if settings.sequence_length is None:
            raise ConfigError(
                f"{where}.sequence_length is missing: the schedule counts tokens, so give the "
                "tokens of a training sequence"
            )
        try:
            PowerLRConfig(a=settings.a, b=settings.b, decay_style=settings.decay_style)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        peak = settings.warmup_max_lr
        if peak is not None and peak <= 0:
            raise ConfigError(
                f"{where}.warmup_max_lr {peak}: must be positive; the paper uses 0.02"
            )
        for name in ("warmup_min_lr", "min_lr"):
            value = getattr(settings, name)
            if value < 0 or (peak is not None and value > peak):
                raise ConfigError(f"{where}.{name} {value}: must lie between 0 and the peak {peak}")
        for phase in PHASES:
            tokens, steps = f"{phase}_tokens", f"{phase}_num_steps"
            if getattr(settings, tokens) is not None and getattr(settings, steps) is not None:
                raise ConfigError(f"{where}: give {tokens} or {steps}, not both")
        return settings

    def arguments(self, batch_size: int) -> dict[str, Any]:
        """Keyword arguments of :class:`torch_plugins.power_lr.PowerLR`, all but ``max_lr``."""
        decay = self._tokens("decay", batch_size) or 0
        return {
            "batch_size": batch_size,
            "sequence_length": self.sequence_length,
            "a": self.a,
            "b": self.b,
            "init_lr": self.warmup_min_lr,
            "min_lr": self.min_lr,
            "warmup_tokens": self._tokens("warmup", batch_size) or 0,
            "decay_tokens": decay,
            "decay_style": self.decay_style,
            # Without a last phase the horizon plays no part, and may change on resume.
            "total_tokens": self._tokens("total", batch_size) if decay else None,
        }

    def check(self, batch_size: int) -> None:
        """Raise before anything is built what the schedule would raise then.

        Raises:
            ConfigError: see :class:`torch_plugins.power_lr.Schedule`.
        """
        given = self.arguments(batch_size)
        power = {name: given.pop(name) for name in ("a", "b", "decay_tokens", "decay_style")}
        del given["batch_size"], given["sequence_length"]
        peak = max(self.min_lr, self.warmup_min_lr, 1.0)  # where only the optimizer knows it
        Schedule(PowerLRConfig(**power), max_lr=self.warmup_max_lr or peak, **given)

    def _tokens(self, phase: str, batch_size: int) -> float | None:
        steps = getattr(self, f"{phase}_num_steps")
        if steps is None:
            return getattr(self, f"{phase}_tokens")
        assert self.sequence_length is not None
        return steps * batch_size * self.sequence_length


def scale_peaks(optimizer: torch.optim.Optimizer, peak: float | None) -> None:
    """Set the largest ``lr`` of the groups to ``peak``; the others keep their proportion to it.

    Where all are 0, all become ``peak``.
    """
    if peak is None:
        return
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(rates)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        scaled = peak * (rate / largest if largest else 1.0)
        group["initial_lr"] = scaled
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def describe_scheduler(scheduler: PowerLR) -> str:
    """One line on the schedule that a scheduler follows."""
    schedule = scheduler.schedule
    text = (
        f"peak {schedule.max_lr:g}, a {schedule.power.a:g}, b {schedule.power.b:g}, "
        f"{scheduler.batch_size:,} sequences of {scheduler.sequence_length:,} tokens"
    )
    if schedule.warmup_tokens:
        text += f", warms up over {schedule.warmup_tokens:,} tokens"
    if schedule.power.decay_tokens:
        style = schedule.power.decay_style
        text += f", decays over the last {schedule.power.decay_tokens:,} tokens ({style})"
    return text
