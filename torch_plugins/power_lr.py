"""The Power schedule in closed form, and as a torch ``LRScheduler`` (arXiv 2408.13359).

With n the tokens trained so far, beta the current global batch in sequences of 4096 tokens, and
N the tokens of the whole run (equations 5 to 8)::

    eta_power(n) = min(eta_max, beta * a * n ** b)

    n <= N_warm:        eta_init + (eta_power(N_warm) - eta_init) * n / N_warm
    n <= N - N_decay:   eta_power(n)
    else:               f(r) * eta_power(N - N_decay),    r = (n - (N - N_decay)) / N_decay

The paper trains at 4096 tokens a sequence only. For other lengths beta is taken as the tokens of
the global batch over 4096, which is the same number there.

``n`` is absolute: a run goes on past any planned N, and without a last phase N plays no part. While
the batch size ramps up, every formula takes the batch of the moment.

Shapes f of the last phase, f(0) = 1 and f(1) = 0:

=======================  ==================================================================
exponential              ``(e ** (1 - r) - 1) / (e - 1)``, as lm-engine decays
megatron-exponential     ``2 * 0.5 ** r - 1``, as Megatron's WSD decays
linear                   ``1 - r``
cosine                   ``(1 + cos(pi * r)) / 2``
=======================  ==================================================================

The paper decays "exponentially to 0" and prints no formula. A minimum rate takes the place of 0 at
the end of the last phase, and bounds eta_power from below.

``python -m torch_plugins.power_lr table`` prints rates, ``... plot`` draws the schedule beside
cosine and WSD.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from torch_plugins.config import ConfigError
from torch_plugins.config import PowerLR as PowerLRConfig

BASE_SEQUENCE_LENGTH = 4096
"""Tokens of a sequence in the paper's runs, which give beta its unit."""

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": lambda r: torch.expm1(1 - r) / math.expm1(1),
    "megatron-exponential": lambda r: 2 * 0.5**r - 1,
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (1 + torch.cos(math.pi * r)) / 2,
}
"""f(r) of the last phase, by the name of its style."""


@dataclass(frozen=True)
class Schedule:
    """One run's schedule; :meth:`rate` maps tokens to learning rates.

    Raises:
        ConfigError: a value out of range, a last phase without ``total_tokens``, or phases that
            overlap.
    """

    power: PowerLRConfig = field(default_factory=PowerLRConfig)
    """a, b, and length and style of the last phase."""
    max_lr: float = 0.02
    """eta_max; the paper's."""
    warmup_tokens: float = 0
    """N_warm."""
    total_tokens: float | None = None
    """N: where the last phase ends; not read without one."""
    min_lr: float = 0.0
    init_lr: float = 0.0
    """Rate at the first token of the warm-up."""

    def __post_init__(self) -> None:
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if value is not None or item.name != "total_tokens":
                number = isinstance(value, Real) and math.isfinite(value)
                _require(item.name, value, number, "must be a finite number")
        _require("max_lr", self.max_lr, self.max_lr > 0, "must be positive; the paper uses 0.02")
        for name in ("min_lr", "init_lr"):
            value = getattr(self, name)
            within = f"must lie between 0 and max_lr {self.max_lr}"
            _require(name, value, 0 <= value <= self.max_lr, within)
        warmup, decay, total = self.warmup_tokens, self.power.decay_tokens, self.total_tokens
        _require("warmup_tokens", warmup, warmup >= 0, "must not be negative; 0 for no warm-up")
        if decay:
            ends = "the last phase ends with the run: give total_tokens, or 0 for no last phase"
            _require("decay_tokens", decay, total is not None, ends)
        if decay and total is not None and warmup + decay > total:
            raise ConfigError(
                f"warmup_tokens {warmup:g} and decay_tokens {decay:g} do not fit into total_tokens "
                f"{total:g}: shorten one, or train longer"
            )

    def crossover(self, batch_tokens: float) -> float:
        """Tokens n up to which ``beta * a * n ** b`` exceeds ``max_lr``; infinite when it ever does
        and b is 0."""
        a, b = batch_tokens / BASE_SEQUENCE_LENGTH * self.power.a, self.power.b
        if not b:
            return math.inf if a > self.max_lr else 0.0
        return float(torch.tensor(self.max_lr / a, dtype=torch.float64) ** (1 / b))

    def rate(
        self,
        tokens: Tensor | float,
        batch_tokens: Tensor | float,
        ratio: float = 1.0,
        min_lr: float | None = None,
    ) -> Tensor:
        """Learning rates after ``tokens`` tokens, in fp64.

        Args:
            tokens: n, of any shape.
            batch_tokens: tokens of the global batch at that moment, of a shape that broadcasts.
            ratio: of a parameter group's maximal rate to ``max_lr``; it applies after the clip at
                ``max_lr``, so groups keep their proportions at every n.
            min_lr: the group's minimum; default: the schedule's, times ``ratio``.

        Returns:
            Tensor of the broadcast shape on the CPU; 0-dimensional for two numbers.

        Raises:
            ConfigError: negative tokens, or a batch that is not positive.
        """
        n = torch.as_tensor(tokens, dtype=torch.float64, device="cpu")
        batch = torch.as_tensor(batch_tokens, dtype=torch.float64, device="cpu")
        _require("tokens", tokens, bool((n >= 0).all()), "must not be negative")
        _require("batch_tokens", batch_tokens, bool((batch > 0).all()), "must be positive")
        beta = batch / BASE_SEQUENCE_LENGTH
        decay, total = self.power.decay_tokens, self.total_tokens
        floor = self.min_lr * ratio if min_lr is None else min_lr
        start = math.inf if not decay or total is None else total - decay
        # Every phase scales eta_power at its anchor: end of the warm-up, n, or start of the decay.
        anchor = n.clamp(min=float(self.warmup_tokens), max=start)
        eta = ratio * (beta * self.power.a * anchor**self.power.b).clamp(max=self.max_lr)
        eta = eta.clamp(min=floor)
        if decay:
            shape = SHAPES[self.power.decay_style](((n - start) / decay).clamp(0, 1))
            eta = torch.where(n > start, floor + (eta - floor) * shape, eta)
        if self.warmup_tokens:
            first = self.init_lr * ratio
            rising = first + (eta - first) * n / self.warmup_tokens
            eta = torch.where(n < self.warmup_tokens, rising, eta)
        return eta


def wsd(
    peak_lr: float,
    total_tokens: int,
    decay_tokens: int,
    *,
    warmup_tokens: int = 0,
    min_lr: float = 0.0,
    decay_style: str = "exponential",
) -> Schedule:
    """Warm-up, constant ``peak_lr``, decay: the schedule with b = 0, the same for every batch."""
    # beta * a is peak_lr for a batch of one token, and clipped for more.
    power = PowerLRConfig(BASE_SEQUENCE_LENGTH * peak_lr, 0.0, decay_tokens, decay_style)
    return Schedule(power, peak_lr, warmup_tokens, total_tokens, min_lr)


def cosine(
    peak_lr: float, total_tokens: int, *, warmup_tokens: int = 0, min_lr: float = 0.0
) -> Schedule:
    """Warm-up, and half a cosine down from ``peak_lr``: :func:`wsd` that decays all along."""
    return wsd(
        peak_lr,
        total_tokens,
        total_tokens - warmup_tokens,
        warmup_tokens=warmup_tokens,
        min_lr=min_lr,
        decay_style="cosine",
    )


class PowerLR(LRScheduler):
    """The Power schedule as a torch scheduler: :meth:`step` after every optimizer step::

        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scheduler = PowerLR(optimizer, batch_size=1024, warmup_tokens=10**9)

    It sets rates in closed form, as ``LambdaLR`` does, and so does not chain with schedulers that
    multiply the current rate; warm-up and last phase are its own. A step whose optimizer step was
    skipped, as ``GradScaler`` skips some, trained nothing: do not call :meth:`step` for it.

    Args:
        optimizer: each group's ``lr`` is its own eta_max; groups keep their proportions. One that
            is added later follows from the next :meth:`step` on.
        batch_size: sequences of the global batch, over all processes and accumulation steps; see
            :meth:`set_batch_size`.
        sequence_length: tokens of a sequence.
        max_lr: the eta_max at which the schedule is clipped, where no group trains at it; a group
            with lr ``x`` gets ``x / max_lr`` of the schedule. Default: the largest ``lr``.
        warmup_tokens, total_tokens, min_lr, init_lr: see :class:`Schedule`.
        a, b, decay_tokens, decay_style: see :class:`torch_plugins.config.PowerLR`.
        last_epoch: index of the last step done, from 0, to go on without a saved state; all steps
            until then count with the batch size given here. ``-1`` for a new run.

    Raises:
        ConfigError: as :class:`Schedule`; a batch size or sequence length that is no positive
            integer; an optimizer that has no rates to go on from.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        sequence_length: int = BASE_SEQUENCE_LENGTH,
        max_lr: float | None = None,
        warmup_tokens: float = 0,
        total_tokens: float | None = None,
        min_lr: float = 0.0,
        init_lr: float = 0.0,
        a: float = 4.0,
        b: float = -0.51,
        decay_tokens: int = 0,
        decay_style: str = "exponential",
        last_epoch: int = -1,
    ) -> None:
        self.batch_size = self.initial_batch_size = _positive("batch_size", batch_size)
        self.sequence_length = _positive("sequence_length", sequence_length)
        # A scheduler before this one, or a loaded state, may have moved "lr" already.
        peaks = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.schedule = Schedule(
            PowerLRConfig(a=a, b=b, decay_tokens=decay_tokens, decay_style=decay_style),
            max_lr=max(peaks) if max_lr is None else max_lr,
            warmup_tokens=warmup_tokens,
            total_tokens=total_tokens,
            min_lr=min_lr,
            init_lr=init_lr,
        )
        self.tokens = max(last_epoch, 0) * self.batch_tokens
        """n: tokens trained so far."""
        super().__init__(optimizer, last_epoch)

    @property
    def batch_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.batch_size * self.sequence_length

    def step(self, epoch: int | None = None) -> None:
        """Count the global batch that was just trained, and set the rates of the next step.

        Args:
            epoch: torch's deprecated argument: so many steps were done, all with the batch size of
                now.
        """
        if epoch is not None:
            self.tokens = epoch * self.batch_tokens
        elif self.last_epoch >= 0:  # else torch's own first call, before any training
            self.tokens += self.batch_tokens
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Rates of all groups at the current token count."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        # Numbers once and for all: reading a tensor on a device waits for it.
        peaks = [float(lr) for lr in self.base_lrs]
        self.base_lrs = list(peaks)
        ratios = [peak / self.schedule.max_lr for peak in peaks]
        rates = {r: float(self.schedule.rate(self.tokens, self.batch_tokens, r)) for r in ratios}
        return [rates[ratio] for ratio in ratios]

    def set_batch_size(self, batch_size: int) -> None:
        """The next step trains ``batch_size`` sequences: its rates follow at once.

        Call it between :meth:`step`, which counts the batch before, and the next optimizer step.
        """
        self.batch_size = _positive("batch_size", batch_size)
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def state_dict(self) -> dict[str, Any]:
        """The position in the run, and the settings for comparison; numbers and strings only."""
        return {
            "tokens": self.tokens,
            "last_epoch": self.last_epoch,
            "batch_size": self.batch_size,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position, with the settings of *this* scheduler, and set the rates.

        So a run can be extended: settings that differ from the saved ones are named in a warning.
        The batch size that :meth:`set_batch_size` had reached is restored, unless this scheduler
        was built with another batch size than the saved one.

        Raises:
            ConfigError: the state of another kind of scheduler.
        """
        missing = [key for key in self.state_dict() if key not in state_dict]
        if missing:
            raise ConfigError(
                f"state of a scheduler without {', '.join(missing)}: not one of PowerLR; to go on "
                "from another schedule, build PowerLR with last_epoch"
            )
        mine, theirs = self._settings(), state_dict["settings"]
        changed = [
            f"{name}: saved {theirs.get(name)}, now {value}"
            for name, value in mine.items()
            if value != theirs.get(name)
        ]
        if changed:
            warnings.warn(
                f"PowerLR resumed with other settings: {'; '.join(changed)}", stacklevel=2
            )
        if theirs.get("batch_size") == self.initial_batch_size:
            self.batch_size = state_dict["batch_size"]
        self.tokens = state_dict["tokens"]
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._apply()

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.schedule)
        lengths = {"batch_size": self.initial_batch_size, "sequence_length": self.sequence_length}
        return settings.pop("power") | settings | lengths


def _require(name: str, value: Any, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name} {value!r}: {remedy}")


def _positive(name: str, value: int) -> int:
    good = isinstance(value, Integral) and not isinstance(value, bool) and value >= 1
    _require(name, value, good, "must be an integer of at least 1")
    return int(value)


if __name__ == "__main__":
    from torch_plugins.power_lr_cli import main

    main()
