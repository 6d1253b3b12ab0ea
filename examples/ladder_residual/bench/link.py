"""A slow link on one machine: a tensor-parallel group whose collectives take as long as asked.

Two processes on one machine reduce through shared memory, so fast that there is nothing to hide. A
*virtual serial link* lets gloo do the work, and makes ``wait()`` return no earlier than

    max(now, link free) + cost

after the launch, where an all-reduce costs one unit, and a reduce-scatter or an all-gather half of
it. It costs no CPU time, as a network card costs none of a GPU's multiprocessors. It is slightly
optimistic: the link of a rank starts when that rank launches, not when the last does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

ProcessGroup: Any = dist.ProcessGroup


@dataclass
class Transfer:
    """One collective, as the link carries it; times of ``time.perf_counter``."""

    what: str
    work: Any
    launched: float
    starts: float
    arrives: float
    waits: list[tuple[float, float]] = field(default_factory=list)

    def wait(self, *_: Any) -> bool:
        asked = time.perf_counter()
        if self.work is not None:
            self.work.wait()
        remaining = self.arrives - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)
        self.waits.append((asked, time.perf_counter()))
        return True


class Link(ProcessGroup):
    """Stands in for a process group, as :func:`install` has it."""

    def __init__(self, group: Any) -> None:
        super().__init__(group.rank(), group.size())
        self.group = group
        self.cost = 0.0
        """Seconds per all-reduce, at least; 0 is the group as it is."""
        self.connected = True
        """False: nothing is communicated; the results are wrong, the compute is not. That is the
        bound no overlap can beat."""
        self.synchronous = False
        """True: a launch waits for its own arrival, whatever the caller asked for."""
        self.transfers: list[Transfer] | None = None
        """Set to a list to have every transfer kept."""
        self._free = 0.0

    def allreduce(self, tensors: Any, options: Any = None) -> Transfer:
        return self._carry("all-reduce", self.cost, "allreduce", tensors, options)

    def all_gather_single(self, output: Tensor, source: Tensor, options: Any = None) -> Transfer:
        return self._carry(
            "all-gather", self.cost / 2, "all_gather_single", output, source, options
        )

    def reduce_scatter_single(
        self, output: Tensor, source: Tensor, options: Any = None
    ) -> Transfer:
        cost = self.cost / 2
        return self._carry("reduce-scatter", cost, "reduce_scatter_single", output, source, options)

    def _carry(self, what: str, cost: float, method: str, *arguments: Any) -> Transfer:
        now = time.perf_counter()
        if not self.connected:
            return Transfer(what, None, now, now, now)
        work = getattr(self.group, method)(*arguments)
        starts = max(now, self._free)
        transfer = Transfer(what, work, now, starts, starts + cost)
        if cost:
            self._free = transfer.arrives
        if self.synchronous:
            transfer.wait()
        if self.transfers is not None:
            self.transfers.append(transfer)
        return transfer


def install() -> Link:
    """Put a link in place of Megatron's tensor-parallel group, for models that are built then."""
    from megatron.core import parallel_state

    link = Link(parallel_state.get_tensor_model_parallel_group())
    ranks = distributed_c10d._world.pg_group_ranks
    ranks[link] = dict(ranks[link.group])
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = link
    return link


def remove(link: Link) -> None:
    """Put the group back."""
    from megatron.core import parallel_state

    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = link.group
    del distributed_c10d._world.pg_group_ranks[link]
