"""Megatron-Core's transformer layer with Ladder Residual (arXiv 2501.06589).

Recurrence over the modules h_1, h_2, ... (attention, MLP, attention, ...), x_0 the embedding::

    x_{i+1} = x_i + reduce(h_{i+1}(x_{i-1})),   x_{-1} = x_0

A module's output is *pending* while its tensor-parallel reduction runs: it is added to the residual
stream one module late, so the reduction overlaps the next module. Megatron's own
``TransformerLayer.forward`` stays in charge; only its two bias-dropout-adds change::

    after attention:  launch reduce(attention);  stream += pending MLP of the layer before
    after the MLP:    launch reduce(MLP);        stream += pending attention

The pending MLP output travels to the next layer in the :class:`~megatron_plugins.carry.Carry` (and
so through activation recomputation); across a pipeline boundary it travels beside the stream as
[s, b, 2h], with its bias and dropout already applied.

A layer with one module only, as in a hybrid stack, adds its output as a layer adds its MLP's.

How the collectives of its column-parallel linears are hidden as well: ``overlap.py``.

In a partial ladder the layer before the first ladder layer keeps its own residual, but hands over
its MLP output as pending; the last ladder layer adds its MLP output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_plugins import carry
from megatron_plugins.carry import Carry
from megatron_plugins.ladder_residual import overlap
from megatron_plugins.reduction import InFlight, keep_partial_sums, reduce_async
from torch_plugins.config import ConfigError, LadderResidual

PENDING = "pending output"

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Megatron's bias-dropout-add: ``(output, bias), residual, dropout -> residual'``."""


@dataclass
class Pending:
    """What completes a module's output: its reduction, its bias and its dropout."""

    bias: Tensor | None = None
    dropout: float = 0.0
    in_flight: InFlight = field(default_factory=InFlight)
    layer: Any = None
    """That of the module."""

    def add(self, output: Tensor, residual: Tensor, add: Add) -> Tensor:
        """``residual + dropout(output + bias)``, once the reduction of ``output`` is there."""
        self.in_flight.wait()
        return add((output, self.bias), residual, self.dropout)

    def complete(self, output: Tensor, residual: Tensor, training: bool) -> Tensor:
        """``dropout(output + bias)`` in the dtype of the residual stream."""
        self.in_flight.wait()
        output = output.to(residual.dtype)
        if self.bias is not None:
            output = output + self.bias.to(residual.dtype)
        return torch.nn.functional.dropout(output, self.dropout, training)


@dataclass(frozen=True)
class Position:
    """What one layer does in the ladder."""

    index: int
    """Zero-based, over the whole model."""
    ladder: bool
    """It is a ladder layer: its attention output is pending while its MLP runs."""
    hands_over: bool
    """The next layer is a ladder layer: the output of its last module stays pending."""
    enters_stage: bool
    """First layer of a pipeline stage whose stream comes with a pending output, [s, b, 2h]."""
    leaves_stage: bool
    """Last layer of a pipeline stage, handing over."""


def positions(ladder_layers: Sequence[int], first: int, count: int) -> list[Position]:
    """Positions of the layers ``first`` to ``first + count - 1`` that one pipeline stage builds."""
    ladder = set(ladder_layers)
    last = first + count - 1
    return [
        Position(
            index=index,
            ladder=index in ladder,
            hands_over=index + 1 in ladder,
            enters_stage=index == first and index > 0 and index in ladder,
            leaves_stage=index == last and index + 1 in ladder,
        )
        for index in range(first, first + count)
    ]


@dataclass
class Stage:
    """What the layers of one block share, by the layer's index."""

    handovers: dict[int, Pending] = field(default_factory=dict)
    """Of its last module, for the next layer."""
    places: overlap.Places = field(default_factory=dict)


@cache
def ladder_layer_class(base: type) -> type:
    """A subclass of Megatron's ``TransformerLayer`` (or of one of its subclasses) with the ladder.

    It takes two more arguments: ``ladder``, its :class:`Position`, and ``stage``, the
    :class:`Stage` of its block.
    """

    layer_class: Any = base

    class LadderLayer(layer_class):
        self_attn_bda: Any
        mlp_bda: Any

        def __init__(self, *args: Any, ladder: Position, stage: Stage, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.ladder, self.stage = ladder, stage
            self.numbers = overlap.numbers(self)
            last = list(self.numbers)[-1]
            self._add: dict[str, Any] = {"attention": self.self_attn_bda, "mlp": self.mlp_bda}
            self._pending: tuple[Tensor, Pending] | None = None
            """Output of the module before the one that runs."""
            self._outgoing: tuple[Tensor, Pending] | None = None
            self._stream: Any = None
            """To which that is added."""
            self._completed: Tensor | None = None
            """The two together, where the sum was needed before the module's end."""
            self.following: tuple[Any, ...] = ()
            """The layer after this one, once it has run; in a tuple, or it would be a submodule."""
            if ladder.ladder and last == "mlp" and "attention" in self.numbers:
                self.self_attn_bda = self._after_attention
            if ladder.ladder or ladder.hands_over:
                after_last = partial(self._after_last, last)
                setattr(self, "mlp_bda" if last == "mlp" else "self_attn_bda", after_last)
            parts = {
                "attention": (self.self_attention, "linear_proj"),
                "mlp": (self.mlp, "linear_fc2"),
            }
            self._reduces = {
                name: (ladder.hands_over if name == last else ladder.ladder)
                and self._keep_partial_sums(*parts[name])
                for name in self.numbers
            }
            self.entrances = overlap.prepare(self)

        def _keep_partial_sums(self, module: torch.nn.Module, name: str) -> bool:
            """Whether the ladder reduces the module's output; a MoE layer's is already combined."""
            linear = getattr(module, name, None)
            if linear is None and module is self.self_attention:
                raise ConfigError(
                    f"{LadderResidual.flag()}: layer {self.ladder.index} has an attention without "
                    f"{name}, {type(module).__name__}; the ladder would wait for its reduction"
                )
            if linear is None or self.config.tensor_model_parallel_size == 1:
                return False
            keep_partial_sums(linear)
            return True

        def _launch(
            self, output_with_bias: tuple[Tensor, Tensor | None], dropout: float, module: str
        ) -> tuple[Tensor, Pending]:
            output, bias = output_with_bias
            computed = bias is not None and not isinstance(bias, torch.nn.Parameter)
            if computed and self.training and not torch.is_grad_enabled():
                # Full recompute: the next chunk adds this bias, and only a parameter's gradient
                # would come back from there.
                raise RuntimeError(
                    f"layer {self.ladder.index}: its bias is computed, not a parameter; the ladder "
                    "would lose its gradient under full activation recomputation"
                )
            pending = Pending(bias, dropout, layer=self)
            if self._reduces[module]:
                group, sequence_parallel = self.pg_collection.tp, self.config.sequence_parallel
                what = f"layer {self.ladder.index}, {module}"
                output, pending.in_flight = reduce_async(output, group, sequence_parallel, what)
            return output, pending

        def complete(self, residual: Tensor, add: Add) -> Tensor:
            """The stream with the pending output of the module before, if any is pending."""
            completed, self._completed = self._completed, None
            pending, self._pending = self._pending, None
            if completed is not None:
                return completed
            if pending is None:
                return residual
            return pending[1].add(pending[0], residual, add)

        def complete_early(self, module: str) -> Tensor:
            """The same while that module runs, of what its bias-dropout-add will be given."""
            pending, stream = self._pending, self._stream
            if self.config.fp32_residual_connection:
                stream = stream.float()
            with self.bias_dropout_add_exec_handler():
                add = self._add[module](self.training, self.config.bias_dropout_fusion)
                stream = self.complete(stream, add)
            if pending is not None:
                overlap.launch_early(pending[0])
            self._completed = stream
            return stream

        def _after_attention(self, training: bool, fused: bool) -> Add:
            add = self._add["attention"](training, fused)

            def step(
                output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
            ) -> Tensor:
                launched = self._launch(output_with_bias, dropout, "attention")
                self._stream = self.complete(residual, add)
                self._pending = launched
                return self._stream

            return step

        def _after_last(self, module: str, training: bool, fused: bool) -> Add:
            add = self._add[module](training, fused)

            def step(
                output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
            ) -> Tensor:
                if self.ladder.hands_over:
                    self._outgoing = self._launch(output_with_bias, dropout, module)
                residual = self.complete(residual, add)
                self._stream = None
                if self.ladder.hands_over:
                    return residual
                return add(output_with_bias, residual, dropout)

            return step

        def forward(
            self, hidden_states: Tensor, *args: Any, context: Carry | None = None, **kwargs: Any
        ) -> tuple[Tensor, Carry | None]:
            """Megatron's forward; ``context`` holds the pending output of the layer before."""
            place = self.ladder
            self._pending = self._completed = None  # an interrupted forward may have left some
            pending_output = carry.get(context, PENDING)
            if place.enters_stage:
                hidden_states, pending_output = (
                    part.contiguous() for part in hidden_states.chunk(2, dim=-1)
                )
                self._pending = pending_output, Pending()
            elif pending_output is not None:
                pending = self.stage.handovers[place.index - 1]
                self._pending = pending_output, pending
                pending.layer.following = (self,)
            self._stream = hidden_states
            context = carry.put(context, {PENDING: None})
            hidden_states, context = super().forward(
                hidden_states, *args, context=context, **kwargs
            )
            if not place.hands_over:
                return hidden_states, context
            assert self._outgoing is not None
            (output, pending), self._outgoing = self._outgoing, None
            if place.leaves_stage:
                output = pending.complete(output, hidden_states, self.training)
                return torch.cat((hidden_states, output), dim=-1), context
            self.stage.handovers[place.index] = pending
            return hidden_states, carry.put(context, {PENDING: output})

    LadderLayer.__name__ = LadderLayer.__qualname__ = f"Ladder{base.__name__}"
    return LadderLayer
