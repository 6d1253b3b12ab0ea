"""The decoder layers of a model, one after another for all batches.

GPTQ wants every input of a layer before any input of the next. A model's own forward pass takes one
batch through all layers, with what its loop passes between them: masks, rotary embeddings, the
second stream of a ladder, keys and values of a sharing group. So each batch has a forward pass of
its own, in a thread that waits at every layer: :class:`Passes` has them all at the same one. Only
one thread runs at a time, and each layer is computed by the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..feature import ConfigError

WIDTH = 4096
"""Tokens of a batch, about."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers, and its name: the outermost with most linear layers.

    Raises:
        ConfigError: no ``nn.ModuleList`` has any.
    """
    found = [
        (sum(isinstance(inner, nn.Linear) for inner in module.modules()), -len(name), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not found or not max(found)[0]:
        raise ConfigError(
            f"{type(model).__name__}: no nn.ModuleList with linear layers, which are quantized one "
            "decoder layer after another"
        )
    _, _, name, layers = max(found, key=lambda row: row[:2])
    return name, layers


class _Stop(BaseException):
    """Ends a forward pass that nobody waits for."""


class Pass(threading.Thread):
    """One batch's forward pass.

    Attributes:
        logits: once it ran to its end.
        at: number of the layer that it waits at.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor) -> None:
        super().__init__(daemon=True)
        self.model, self.input_ids = model, input_ids
        self.arrived: SimpleQueue[BaseException | None] = SimpleQueue()
        self.answer: SimpleQueue[Any] = SimpleQueue()
        self.at = -1
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.logits: Tensor | None = None

    def run(self) -> None:
        error: BaseException | None = None
        try:
            with torch.no_grad():
                self.logits = self.model(input_ids=self.input_ids, use_cache=False).logits
        except BaseException as caught:
            error = None if isinstance(caught, _Stop) else caught
        self.at = -1
        self.arrived.put(error)

    def layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer ``index`` of the model does in this thread: wait for its output."""
        self.at, self.call = index, (args, kwargs)
        self.arrived.put(None)
        output = self.answer.get()
        if isinstance(output, _Stop):
            raise output
        return output

    def go_on(self, output: Any) -> None:
        """Let the pass run to the next layer, or its end."""
        self.call = ((), {})
        self.answer.put(output)
        self.wait()

    def wait(self) -> None:
        error = self.arrived.get()
        if error is not None:
            raise error


class Passes:
    """Forward passes of a model that stop at each of its layers; a context manager.

        with Passes(model, layers, batches) as passes:
            for index, layer in enumerate(layers):
                for run in passes.inputs(index):
                    run()  # any number of times
                passes.advance(index)

    Args:
        batches: token ids ``[B, S]`` each.
        probe: token ids whose pass runs to its end; see :meth:`logits`. It takes no part in
            :meth:`inputs`.
        device: where layers are computed, the probe excepted; what is passed between them waits
            where the model's embedding is.

    The model must be in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        batches: Sequence[Tensor],
        probe: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.layers, self.device = layers, device
        self.passes = [Pass(model, ids) for ids in batches]
        self.probe = None if probe is None else Pass(model, probe)

    def _all(self) -> list[Pass]:
        return self.passes if self.probe is None else [*self.passes, self.probe]

    def __enter__(self) -> Passes:
        self.forwards = [layer.forward for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = _waiting(index)
        try:
            for one in self._all():
                one.start()
                one.wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._all():
            if one.is_alive() and one.at >= 0:
                one.answer.put(_Stop())
            if one.ident is not None:
                one.join()
        for layer in self.layers:
            vars(layer).pop("forward", None)

    def inputs(self, index: int) -> Iterator[Callable[[], Any]]:
        """For each batch, a function that computes the layer ``index`` on its input."""
        for one in self.passes:
            yield partial(self._compute, one, index, self.device)

    def advance(self, index: int) -> None:
        """Take all passes through the layer ``index``, as it is now."""
        for one in self.passes:
            output = self._compute(one, index, self.device)
            one.go_on(output if index + 1 < len(self.layers) else _Stop())
        if self.probe is not None:
            where = next(self.layers[index].parameters()).device
            self.layers[index].cpu()
            self.probe.go_on(self._compute(self.probe, index, "cpu"))
            self.layers[index].to(where)

    def logits(self) -> Tensor:
        """Of the probe, after the last layer."""
        assert self.probe is not None
        self.probe.join()
        assert self.probe.logits is not None
        return self.probe.logits

    def _compute(self, one: Pass, index: int, device: torch.device | str | None) -> Any:
        if one.at != index:
            raise IndexError(f"layer {index}: the passes wait at layer {one.at}")
        args, kwargs = one.call
        if device is None:
            return self.forwards[index](*args, **kwargs)
        home = one.input_ids.device
        args, kwargs = tree_map(lambda value: _move(value, device), (args, kwargs))
        return tree_map(lambda value: _move(value, home), self.forwards[index](*args, **kwargs))


def _waiting(index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread()
        assert isinstance(thread, Pass)
        return thread.layer(index, args, kwargs)

    return forward


def _move(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def batches_of(input_ids: Tensor) -> list[Tensor]:
    """Sequences ``[N, S]`` in batches of about :data:`WIDTH` tokens."""
    return list(input_ids.split(max(1, WIDTH // input_ids.shape[1])))
