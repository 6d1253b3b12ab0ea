"""Streams and events are inert: on the CPU every operation is finished when its call returns."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from megatron_plugins.cpu.device import CPU
from megatron_plugins.cpu.piece import Piece, replace


class Event:
    """Remembers when it was recorded, so that event timers keep working."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded = 0.0

    def record(self, stream: Any = None) -> None:
        self._recorded = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between two records."""
        return (end_event._recorded - self._recorded) * 1000

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    """Accepts everything a CUDA stream does and orders nothing."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...


def _streams() -> None:
    only = Stream()
    answers: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "ExternalStream": Stream,
        "current_stream": lambda device=None: only,
        "default_stream": lambda device=None: only,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        replace(torch.cuda, name, answer)
    replace(torch.Tensor, "record_stream", lambda self, stream: None)


PIECES = (
    Piece(
        "streams", "communication and timing use CUDA streams and events", "everything", _streams
    ),
)
