"""What features add to Megatron's training log: means over layers, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugins.auxiliary_loss import SCOPE


class Meter:
    """Sums since the last :meth:`take`, ``[kinds, names + 1]``, the last column the weight.

    Args:
        kinds: of layers, in rows.
        names: of what is counted of each; logged as ``name kind``.
    """

    def __init__(self, kinds: Sequence[str], names: Sequence[str]) -> None:
        self.kinds, self.names = tuple(kinds), tuple(names)
        self._sums: Tensor | None = None
        METERS.append(self)

    def add(self, kind: str, values: Sequence[Tensor], weight: Tensor | float = 1.0) -> None:
        """Count one layer's micro-batch: sums, one for each name, over ``weight`` things."""
        row = torch.stack([*values, torch.as_tensor(weight).to(values[0])])
        if self._sums is None:
            self._sums = row.new_zeros(len(self.kinds), len(row))
        self._sums[self.kinds.index(kind)] += row

    def take(self) -> dict[str, Tensor]:
        """Means over all processes, which all call this."""
        device = torch.cuda.current_device()
        sums, self._sums = self._sums, None
        if sums is None:  # a pipeline stage without layers
            sums = torch.zeros(len(self.kinds), len(self.names) + 1, device=device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {
            f"{name} {kind}": sums[row, column] / sums[row, -1]
            for row, kind in enumerate(self.kinds)
            if sums[row, -1] > 0
            for column, name in enumerate(self.names)
        }


METERS: list[Meter] = []
"""Of the features that are imported, which are the same in all processes."""


def log(original: Callable[..., Any], loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``training_log``, called on every process after every step.

    Raises:
        RuntimeError: a layer's loss is attached where no backward pass comes by.
    """
    SCOPE.check()
    SCOPE.take()
    more: dict[str, Any] = {}
    for meter in METERS:
        more.update(meter.take())
    return original({**loss_dict, **more}, *args, **kwargs)
