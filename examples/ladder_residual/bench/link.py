"""A slow link on one machine: gloo does the work, and waiting for it takes as long as asked.

Two processes on one machine reduce through shared memory, so fast that there is nothing to hide. A
*virtual serial link* lets gloo do the all-reduce and makes ``wait()`` return no earlier than

    max(now, link free) + latency + bytes / bandwidth

after the launch. It costs no CPU time, as a network card costs none of a GPU's multiprocessors. It
is slightly optimistic: the link of a rank starts when that rank launches, not when the last does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Transfer:
    """What :func:`torch.distributed.all_reduce` returns with ``async_op=True``."""

    def __init__(self, work: Any, arrival: float) -> None:
        self.work, self.arrival = work, arrival

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        remaining = self.arrival - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)


class Link:
    """Stands in for :func:`torch.distributed.all_reduce` while installed."""

    def __init__(self) -> None:
        self.latency = 0.0
        """Seconds per all-reduce on top of what gloo takes."""
        self.bandwidth = float("inf")
        """Bytes per second."""
        self.connected = True
        """False: nothing is reduced and nothing waited for; the results are wrong, the compute is
        not. That is the bound no overlap can beat."""
        self.synchronous = False
        """True: a launch waits for its own arrival, whatever the caller asked for."""
        self._free = 0.0
        self._all_reduce: Callable[..., Any] = dist.all_reduce

    def install(self) -> None:
        dist.all_reduce = self.all_reduce  # type: ignore[assignment]

    def remove(self) -> None:
        dist.all_reduce = self._all_reduce

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Transfer | None:
        if not self.connected:
            return Transfer(None, 0.0) if async_op else None
        transfer = Transfer(
            self._all_reduce(tensor, op, group, async_op=True),
            self._arrival(tensor.numel() * tensor.element_size()),
        )
        if async_op and not self.synchronous:
            return transfer
        transfer.wait()
        return Transfer(None, 0.0) if async_op else None

    def _arrival(self, size: int) -> float:
        cost = self.latency + size / self.bandwidth
        if cost:
            self._free = max(time.perf_counter(), self._free) + cost
        return self._free
