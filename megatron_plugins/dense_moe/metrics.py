"""What Megatron's training log says of the routers.

Per kind, means over layers, micro-batches and data-parallel processes of a step:

- ``mi mlp``: mutual information of tokens and experts, the negative of the loss, 0 to log N nats;
- ``entropy mlp``: of the experts given a token, log N where a router knows nothing, 0 where sure;
- ``active mlp``: share of (token, expert) pairs above ``--dsmoe-threshold``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugins.auxiliary_loss import SCOPE
from torch_plugins.dense_moe import Utilization

KINDS = ("mlp", "attention")
NAMES = ("mi", "entropy", "active")


class Meter:
    """Sums since the last :meth:`take`, ``[kinds, names + 1]``, the last column the count."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, kind: str, found: Utilization) -> None:
        """Count one router's micro-batch."""
        values = (found.mutual_information, found.conditional_entropy, found.active_N.mean())
        row = torch.stack([*values, torch.ones_like(values[0])])
        if self._sums is None:
            self._sums = row.new_zeros(len(KINDS), len(row))
        self._sums[KINDS.index(kind)] += row

    def take(self) -> dict[str, Tensor]:
        """Means over all processes, which all call this; by name, as logged."""
        device = torch.cuda.current_device()
        sums, self._sums = self._sums, None
        if sums is None:  # a pipeline stage without layers
            sums = torch.zeros(len(KINDS), len(NAMES) + 1, device=device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {
            f"{name} {kind}": sums[row, column] / sums[row, -1]
            for row, kind in enumerate(KINDS)
            if sums[row, -1] > 0
            for column, name in enumerate(NAMES)
        }


METER = Meter()


def log(original: Callable[..., Any], loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``training_log``, called on every process after every step.

    Raises:
        RuntimeError: a router's loss is attached where no backward pass comes by.
    """
    SCOPE.check()
    SCOPE.take()
    return original({**loss_dict, **METER.take()}, *args, **kwargs)
