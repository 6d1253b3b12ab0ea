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
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
        decay, total, warmup = self.power.decay_tokens, self.total_tokens, self.warmup_tokens
        if not 0 <= self.min_lr <= self.max_lr:
            raise ConfigError(f"min_lr {self.min_lr}: must lie between 0 and max_lr {self.max_lr}")
        if not 0 <= self.init_lr <= self.max_lr:
            raise ConfigError(
                f"initial rate {self.init_lr}: must lie between 0 and max_lr {self.max_lr}"
            )
        if warmup < 0:
            raise ConfigError(f"warm-up of {warmup} tokens: must not be negative")
        if decay and total is None:
            raise ConfigError(
                f"decay_tokens {decay}: the last phase ends with the run; give total_tokens"
            )
        if decay and total is not None and decay + warmup > total:
            raise ConfigError(
                f"warm-up of {warmup:g} and last phase of {decay:g} tokens do not fit into a run "
                f"of {total:g}: shorten one, or train longer"
            )

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
            Tensor of the broadcast shape; 0-dimensional for two numbers.
        """
        n = torch.as_tensor(tokens, dtype=torch.float64)
        beta = torch.as_tensor(batch_tokens, dtype=torch.float64) / BASE_SEQUENCE_LENGTH
        decay, total, floor = self.power.decay_tokens, self.total_tokens, min_lr
        floor = self.min_lr * ratio if floor is None else floor
        start = math.inf if not decay or total is None else total - decay
        # Every phase scales eta_power at its anchor: end of the warm-up, n, or start of the decay.
        anchor = n.clamp(min=float(self.warmup_tokens), max=start)
        eta = ratio * (beta * self.power.a * anchor**self.power.b).clamp(max=self.max_lr)
        eta = eta.clamp(min=floor)
        if decay:
            shape = SHAPES[self.power.decay_style](((n - start) / decay).clamp(0, 1))
            eta = floor + (eta - floor) * shape
        if self.warmup_tokens:
            rising = self.init_lr + (eta - self.init_lr) * n / self.warmup_tokens
            eta = torch.where(n <= self.warmup_tokens, rising, eta)
        return eta


class PowerLR(LRScheduler):
    """The Power schedule as a torch scheduler: call :meth:`step` after every optimizer step.

    Args:
        optimizer: each group's ``lr`` is its own eta_max; groups keep their proportions.
        batch_size: sequences of the global batch, over all processes and accumulation steps; see
            :meth:`set_batch_size`.
        sequence_length: tokens of a sequence.
        max_lr: the eta_max at which the schedule is clipped; default: the largest ``lr`` of a
            group. A group with lr ``x`` gets ``x / max_lr`` of the schedule.
        warmup_tokens, total_tokens, min_lr, init_lr: see :class:`Schedule`.
        a, b, decay_tokens, decay_style: see :class:`torch_plugins.config.PowerLR`.
        last_epoch: steps done before; they count with the batch size given here. ``-1`` for none.

    Raises:
        ConfigError: as :class:`Schedule`; a batch size or sequence length below 1.
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
        if sequence_length < 1:
            raise ConfigError(f"sequence_length {sequence_length}: must be at least 1")
        key = "lr" if last_epoch == -1 else "initial_lr"
        groups = [float(group[key]) for group in optimizer.param_groups]
        self.schedule = Schedule(
            PowerLRConfig(a=a, b=b, decay_tokens=decay_tokens, decay_style=decay_style),
            max_lr=max(groups) if max_lr is None else max_lr,
            warmup_tokens=warmup_tokens,
            total_tokens=total_tokens,
            min_lr=min_lr,
            init_lr=init_lr,
        )
        self.sequence_length = sequence_length
        self.batch_size = _checked(batch_size)
        self.tokens = max(last_epoch, 0) * batch_size * sequence_length
        """n: tokens trained so far."""
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Count the global batch that was just trained, and set the rates of the next step."""
        if epoch is not None:
            self.tokens = epoch * self.batch_size * self.sequence_length
        elif self.last_epoch >= 0:  # else torch's own first call, before any training
            self.tokens += self.batch_size * self.sequence_length
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Rates of all groups at the current token count."""
        peak = self.schedule.max_lr
        ratios = [float(base) / peak if peak else 1.0 for base in self.base_lrs]
        batch_tokens = self.batch_size * self.sequence_length
        rates = {ratio: self.schedule.rate(self.tokens, batch_tokens, ratio) for ratio in ratios}
        return [float(rates[ratio]) for ratio in ratios]

    def set_batch_size(self, batch_size: int) -> None:
        """The next step trains ``batch_size`` sequences: its rates follow at once."""
        self.batch_size = _checked(batch_size)
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The position in the run, and the settings for comparison."""
        return {
            "tokens": self.tokens,
            "last_epoch": self.last_epoch,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position, with the settings and batch size of *this* scheduler.

        So a run can be extended: settings that differ from the saved ones are named in a warning.
        """
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
        self.tokens = state_dict["tokens"]
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._apply()

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.schedule)
        return settings.pop("power") | settings | {"batch_size": self.batch_size}


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: must be at least 1 sequence")
    return batch_size
