"""Ladder Residual on Megatron-Core's transformer layers (arXiv 2501.06589).

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

In a partial ladder the layer before the first ladder layer keeps its own residual, but hands over
its MLP output as pending; the last ladder layer adds its MLP output itself.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_plugins import carry
from megatron_plugins.carry import Carry
from megatron_plugins.reduction import InFlight, keep_partial_sums, reduce_async
from megatron_plugins.refusals import Refusal, cuda_graphs, on
from torch_plugins.config import ConfigError, LadderResidual

PENDING = "pending MLP output"

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Megatron's bias-dropout-add: ``(output, bias), residual, dropout -> residual'``."""


@dataclass
class Pending:
    """What completes a module's output: its reduction, its bias and its dropout."""

    bias: Tensor | None = None
    dropout: float = 0.0
    in_flight: InFlight = field(default_factory=InFlight)

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
    """The next layer is a ladder layer: its MLP output stays pending."""
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


@cache
def ladder_layer_class(base: type) -> type:
    """A subclass of Megatron's ``TransformerLayer`` (or of one of its subclasses) with the ladder.

    It takes two more arguments: ``ladder``, its :class:`Position`, and ``handovers``, a dictionary
    shared by the layers of one block, in which a layer leaves the :class:`Pending` of its MLP.
    """

    layer_class: Any = base

    class LadderLayer(layer_class):
        self_attn_bda: Any
        mlp_bda: Any

        def __init__(
            self, *args: Any, ladder: Position, handovers: dict[int, Pending], **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self.ladder, self.handovers = ladder, handovers
            self._add: dict[str, Any] = {"attention": self.self_attn_bda, "mlp": self.mlp_bda}
            self._incoming: tuple[Tensor, Pending] | None = None
            self._attention: tuple[Tensor, Pending] | None = None
            self._outgoing: tuple[Tensor, Pending] | None = None
            if ladder.ladder:
                self.self_attn_bda = self._after_attention
            if ladder.ladder or ladder.hands_over:
                self.mlp_bda = self._after_mlp
            self._reduces_attention = ladder.ladder and self._keep_partial_sums(
                self.self_attention, "linear_proj"
            )
            self._reduces_mlp = ladder.hands_over and self._keep_partial_sums(
                self.mlp, "linear_fc2"
            )

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
            self, output_with_bias: tuple[Tensor, Tensor | None], dropout: float, reduces: bool
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
            if not reduces:
                return output, Pending(bias, dropout)
            group, sequence_parallel = self.pg_collection.tp, self.config.sequence_parallel
            output, in_flight = reduce_async(output, group, sequence_parallel)
            return output, Pending(bias, dropout, in_flight)

        def _after_attention(self, training: bool, fused: bool) -> Add:
            add = self._add["attention"](training, fused)

            def step(
                output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
            ) -> Tensor:
                self._attention = self._launch(output_with_bias, dropout, self._reduces_attention)
                incoming, self._incoming = self._incoming, None
                if incoming is None:
                    return residual
                output, pending = incoming
                return pending.add(output, residual, add)

            return step

        def _after_mlp(self, training: bool, fused: bool) -> Add:
            add = self._add["mlp"](training, fused)

            def step(
                output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
            ) -> Tensor:
                if self.ladder.hands_over:
                    self._outgoing = self._launch(output_with_bias, dropout, self._reduces_mlp)
                if self._attention is not None:
                    (output, pending), self._attention = self._attention, None
                    residual = pending.add(output, residual, add)
                if self.ladder.hands_over:
                    return residual
                return add(output_with_bias, residual, dropout)

            return step

        def forward(
            self, hidden_states: Tensor, *args: Any, context: Carry | None = None, **kwargs: Any
        ) -> tuple[Tensor, Carry | None]:
            """Megatron's forward; ``context`` holds the pending MLP output of the layer before."""
            place = self.ladder
            pending_output = carry.get(context, PENDING)
            if place.enters_stage:
                hidden_states, pending_output = (
                    part.contiguous() for part in hidden_states.chunk(2, dim=-1)
                )
                self._incoming = pending_output, Pending()
            elif pending_output is not None:
                self._incoming = pending_output, self.handovers[place.index - 1]
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
            self.handovers[place.index] = pending
            return hidden_states, carry.put(context, {PENDING: output})

    LadderLayer.__name__ = LadderLayer.__qualname__ = f"Ladder{base.__name__}"
    return LadderLayer


def transform(
    layer_specs: Sequence[Any], config: Any, feature: LadderResidual, first: int
) -> Sequence[Any]:
    """Layer specs of one pipeline stage, beginning at global layer ``first``, with the ladder.

    Specs that have it already are returned as they are.
    """
    if any("ladder" in (spec.params or {}) for spec in layer_specs):
        return layer_specs
    handovers: dict[int, Pending] = {}
    places = positions(feature.resolve(config.num_layers), first, len(layer_specs))
    return [
        _with_ladder(spec, place, handovers) if place.ladder or place.hands_over else spec
        for spec, place in zip(layer_specs, places, strict=True)
    ]


def _with_ladder(spec: Any, place: Position, handovers: dict[int, Pending]) -> Any:
    cross_attention = getattr(spec.submodules, "cross_attention", None)
    if cross_attention is not None and getattr(cross_attention, "__name__", "") != "IdentityOp":
        raise ConfigError(
            f"{LadderResidual.flag()}: layer {place.index} has cross-attention; "
            "the ladder is defined for decoder-only models"
        )
    params = {**(spec.params or {}), "ladder": place, "handovers": handovers}
    return replace(spec, module=ladder_layer_class(spec.module), params=params)


def validate(args: Namespace, feature: LadderResidual) -> None:
    """Refuse a ladder without layers, before anything is built."""
    if not feature.resolve(args.num_layers):
        raise ConfigError(
            f"{feature.flag()} with {feature.flag('layers')} {feature.layers!r} has no ladder "
            f"layer: name at least one of 0 to {args.num_layers - 1}, or drop {feature.flag()}"
        )


def adjust_config(config: Any, feature: LadderResidual) -> None:
    """Let pipeline stages exchange the shape of what they send: [s, b, 2h] at a ladder boundary."""
    if config.pipeline_model_parallel_size > 1:
        config.variable_seq_lengths = True


_BYPASS = "it runs the layers without their forward, so the residual would be the standard one"
_UNREAD = "it computes the reduction inside the linear, where the ladder must not have one"

REFUSED: tuple[Refusal, ...] = (
    Refusal("--cuda-graph-impl", cuda_graphs, f"a captured layer is replayed alone: {_BYPASS}"),
    Refusal("--tp-comm-overlap", on("tp_comm_overlap"), f"userbuffers: {_UNREAD}"),
    Refusal("--overlap-moe-expert-parallel-comm", on("overlap_moe_expert_parallel_comm"), _BYPASS),
    Refusal(
        "--mtp-num-layers",
        on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would not be ladders",
    ),
    Refusal(
        "--enable-mhc-connections",
        on("enable_mhc_connections"),
        "hyper-connections replace the residual stream that the ladder reads",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        _UNREAD,
    ),
    Refusal("--inference-fuse-tp-communication", on("inference_fuse_tp_communication"), _UNREAD),
    Refusal("--use-transformer-engine-op-fuser", on("use_transformer_engine_op_fuser"), _UNREAD),
    Refusal("--symmetric-ar-type", on("symmetric_ar_type"), _UNREAD),
    Refusal(
        "--heterogeneous-layers-config-path",
        on("heterogeneous_layers_config_path"),
        "its layers may lack an attention or an MLP, and the recurrence needs both",
    ),
    Refusal(
        "--use-megatron-fsdp",
        on("use_megatron_fsdp"),
        "it frees a layer's bias before the ladder adds it",
    ),
    Refusal(
        "--use-torch-fsdp2",
        on("use_torch_fsdp2"),
        "it frees a layer's bias before the ladder adds it",
    ),
    Refusal(
        "--cpu-offloading-num-layers",
        on("cpu_offloading_num_layers"),
        "it may copy an output to the host while its reduction still runs",
    ),
    Refusal(
        "--fine-grained-activation-offloading",
        on("fine_grained_activation_offloading"),
        "it frees the residual after the attention, and the ladder still reads it",
    ),
)
