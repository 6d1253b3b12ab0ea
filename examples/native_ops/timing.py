"""Arms take turns: one sample of each in every round, each round beginning with another.

A sample is the mean of as many calls as fill a few milliseconds, after one that is not counted. Of
one thread the CPU time of the process counts, which other programs do not change much; of several
the time on the wall. Ratios are medians over the rounds of quotients taken within one, with the
middle half of them as their spread.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

Call = Callable[[int], object]
"""One computation; its number chooses among copies of what it reads."""
Times = dict[str, dict[str, list[float]]]
"""Arm, then ``wall`` and ``cpu``: seconds of a call in each round."""

PAUSE = 0.005
"""Seconds until the threads of the last arm have stopped waiting for work."""
LONG = 0.02
"""Seconds of a call that needs none before it, and none beside it, to be measured well."""


@dataclass(frozen=True)
class Effort:
    """How long one row may take."""

    seconds: float = 4.0
    sample: float = 0.01
    fewest: int = 7
    most: int = 31
    """Rounds."""


def take_turns(calls: Mapping[str, Call], effort: Effort, threads: int) -> Times:
    """Measure every arm; what is slow is called less often, in no fewer rounds."""
    numbers = dict.fromkeys(calls, 0)

    def sample(arm: str, count: int) -> tuple[float, float]:
        call, first = calls[arm], numbers[arm]
        numbers[arm] += count
        wall, cpu = time.perf_counter(), time.process_time()
        for number in range(first, first + count):
            call(number)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return wall / count, cpu / count

    counts = {}
    for arm in calls:
        sample(arm, 1)
        once = min(sample(arm, 1)[0] for _ in range(2))
        counts[arm] = max(1, min(1000, round(effort.sample / max(once, 1e-7))))
    times: Times = {arm: {"wall": [], "cpu": []} for arm in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    begun = time.perf_counter()
    try:
        for turn in range(effort.most):
            first = turn % len(order)
            for arm in order[first:] + order[:first]:
                if threads > 1:
                    time.sleep(PAUSE)
                last = times[arm]["wall"][-1:]
                if not last or last[0] < LONG:
                    sample(arm, 1)
                wall, cpu = sample(arm, counts[arm])
                times[arm]["wall"].append(wall)
                times[arm]["cpu"].append(cpu)
            if turn + 1 >= effort.fewest and time.perf_counter() - begun > effort.seconds:
                break
    finally:
        gc.enable()
    return times


def ratio(base: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster ``own`` is: the median, and the quartiles of the rounds' quotients."""
    each = [b / o for b, o in zip(base, own, strict=True)]
    low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return median(each), low, high
