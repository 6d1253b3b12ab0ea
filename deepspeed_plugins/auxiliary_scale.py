"""What DeepSpeed multiplies the main loss by, for the auxiliary losses of the same backward pass.

It is measured, not restated:

- ``engine.backward(loss)``: a hook on the script's loss sees it before any layer does;
- ``engine.scale(loss).backward()`` and ``loss.backward()``: the same hook, or one, times what the
  engine's hooks on the outputs of its forward do to a gradient;
- stages of a pipeline that have no loss: ``engine.scale`` of a one.

The losses of an engine see its own passes, and those of others that go through its outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from torch_plugins.auxiliary_loss import Scope
from torch_plugins.config import ConfigError

REMEDY = "run the engine, not its module, and call engine.backward(loss)"


class EngineLosses:
    """The auxiliary losses of one engine, and the scale of the backward pass that runs.

    Args:
        names: of the losses on all stages, sorted.
        micro_batches: that the script accumulates beside the JSON's.
    """

    def __init__(self, names: list[str], micro_batches: int) -> None:
        self.scope = Scope(REMEDY)
        self.names, self.micro_batches = names, micro_batches
        self.last: dict[str, Tensor] = {}
        self.tensors = 0
        self.factor: Tensor | None = None
        self.task: int | None = None
        self.at_outputs: float | None = None

    def begin(self, factor: Tensor, task: int | None = None) -> None:
        """A backward pass starts, of ``factor`` times the main loss.

        Args:
            task: autograd's number of the pass, with which it ends; None: it ends with :meth:`end`.
        """
        self.end()
        self.factor = self.scope.scale = factor / self.micro_batches
        self.task = task
        if task is not None:
            _at_the_end(self.end)

    def end(self) -> None:
        self.factor = self.task = self.at_outputs = self.scope.scale = None

    def pass_output(self, factor: float, device: torch.device) -> None:
        """The pass goes through an output of the engine's forward, where DeepSpeed multiplies it by
        ``factor``. It was not seen to start if it is torch's own, or another engine's."""
        task = torch._C._current_graph_task_id()
        if self.factor is None or self.task not in (None, task):
            started = torch.ones((), device=device) if _measured is None else _measured
            self.begin(started, task)
        if self.at_outputs is None:
            assert self.factor is not None
            self.at_outputs = factor
            self.scope.scale = self.factor * factor


engines: WeakKeyDictionary[Any, EngineLosses] = WeakKeyDictionary()
"""Those that have auxiliary losses; others cost nothing."""

_measured: Tensor | None = None
"""Factor of the main loss in the pass that runs, for engines that another one's pass reaches."""


def backward(
    original: Callable[..., Any],
    engine: Any,
    loss: Any,
    retain_graph: bool = False,
    scale_wrt_gas: bool = True,
    **others: Any,
) -> Any:
    """Wrap of ``DeepSpeedEngine.backward``."""
    options = {"retain_graph": retain_graph, "scale_wrt_gas": scale_wrt_gas, **others}
    if not engines or not isinstance(loss, Tensor) or not loss.requires_grad:
        return original(engine, loss, **options)
    divisor = 1 if scale_wrt_gas else engine.gradient_accumulation_steps()
    hook = _measure(engine, loss, divisor, ends_itself=False)
    with _ending(engine):
        try:
            return original(engine, loss, **options)
        finally:
            hook.remove()


def scale(original: Callable[..., Any], engine: Any, loss: Any) -> Any:
    """Wrap of ``DeepSpeedEngine.scale``, whose result the script differentiates."""
    scaled = original(engine, loss)
    if engines:
        _measure(engine, loss, 1, ends_itself=True)
    return scaled


def _measure(engine: Any, loss: Tensor, divisor: int, ends_itself: bool) -> Any:
    """Hook ``loss``: a backward pass tells by what it is multiplied, before it reaches a layer."""

    def begin(gradient: Tensor) -> None:
        global _measured
        _measured = gradient.detach().reshape(()) / divisor
        if engine in engines:
            task = torch._C._current_graph_task_id() if ends_itself else None
            engines[engine].begin(_measured, task)
        if ends_itself:
            _at_the_end(_forget)

    return loss.register_hook(begin)


def _at_the_end(function: Callable[[], None]) -> None:
    """Call ``function`` when the backward pass that runs is over."""
    Variable._execution_engine.queue_callback(function)


def _forget() -> None:
    global _measured
    _measured = None


@contextmanager
def _ending(engine: Any) -> Iterator[None]:
    """However a pass ends, its scale ends with it."""
    try:
        yield
    finally:
        _forget()
        if engine in engines:
            engines[engine].end()


def train_batch(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``PipelineEngine.train_batch``: the scale on stages that have no loss to measure. On
    the last one, ``backward`` measures."""
    if engine not in engines:
        return original(engine, *args, **kwargs)
    with _ending(engine):
        engines[engine].begin(_scale_of_one(engine) / engine.gradient_accumulation_steps())
        return original(engine, *args, **kwargs)


def _scale_of_one(engine: Any) -> Tensor:
    """What the engine multiplies losses by, apart from accumulation."""
    expected = engine._manual_backward_expected
    with torch.enable_grad():
        one = torch.ones((), device=engine.device, requires_grad=True)
        scaled = inspect.unwrap(type(engine).scale)(engine, one * 1)  # a leaf is returned as it is
    engine._manual_backward_expected = expected
    return scaled.detach()


def outputs(original: Callable[..., Any], engine: Any) -> None:
    """Wrap of ``DeepSpeedEngine._backward_prologue``, called at the first output of each forward
    that a backward pass goes through."""
    if engine in engines:
        engines[engine].tensors = 0
    original(engine)


def output(original: Callable[..., Any], engine: Any, gradient: Any) -> Any:
    """Wrap of ``DeepSpeedEngine._backward_prologue_per_tensor``, called at each of these outputs.

    Raises:
        ConfigError: DeepSpeed divides the gradient by the accumulation steps at several tensors, so
            repeatedly where one is computed from another, as a loss is from logits. ZeRO 3 returns
            copies, none computed from another.
    """
    own = engines.get(engine)
    if own is None or gradient is None:
        return original(engine, gradient)
    factor = float(original(engine, torch.ones(())))  # on the CPU: nothing waits for the GPU
    own.tensors += 1
    if factor != 1 and own.tensors > 1 and engine.zero_optimization_stage() < 3:
        raise ConfigError(
            "the model returns several tensors, such as loss and logits, and DeepSpeed divides the "
            "gradient by gradient_accumulation_steps at each of them, so main and auxiliary losses "
            "would be weighted differently: return one tensor, or call engine.backward(loss) of "
            "deepspeed 0.19.6 or later"
        )
    own.pass_output(factor, gradient.device)
    return original(engine, gradient)
