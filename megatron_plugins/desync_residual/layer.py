"""Megatron-Core's transformer layer with Desync Residual.

With x^r the residual stream of rank r of T, and p^r the partial sum of a module h there::

    x^r = x^r + p^r,            p^r = h^r(norm^r(x^r))       a module that does not reduce
    x   = sum over r of (p^r + x^r / T)                      one that does

Between the two lies a *region*. Its modules communicate nothing, neither their outputs nor, in the
backward, the gradients of their inputs: a rank's input is read by that rank alone. Where a region
begins, all ranks read one x, so that there the backward adds their gradients up::

    forward     begin: nothing                end: all-reduce
    backward    begin: all-reduce             end: the gradient to p^r, and over T to x^r

Under sequence parallelism a stream outside of regions is divided along the sequence: a region
begins with an all-gather and ends with a reduce-scatter, and the backward has the other of the two.

Megatron's own ``TransformerLayer.forward`` stays in charge; only its two bias-dropout-adds change.
Shapes: [s, b, h] within a region; outside [s, b, h], or [s/T, b, h] with sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.transformer import utils
from torch import Tensor

from megatron_plugins.reduction import keep_partial_sums
from torch_plugins.config import ConfigError, DesyncResidual
from torch_plugins.desync_config import DesyncPlace

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Megatron's bias-dropout-add: ``(output, bias), residual, dropout -> residual'``."""


@cache
def desync_layer_class(base: type) -> type:
    """A subclass of Megatron's ``TransformerLayer`` (or of one of its subclasses).

    It takes one more argument: ``desync``, the places of its attention and its MLP.
    """
    layer_class: Any = base

    class DesyncLayer(layer_class):
        def __init__(
            self, *args: Any, desync: tuple[DesyncPlace, DesyncPlace], **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            attention, mlp = desync
            self.enters = attention.enters
            if attention.inside:
                self._stay_apart(self.self_attention, "linear_proj", self.input_layernorm)
            if mlp.inside:
                self._stay_apart(self.mlp, "linear_fc2", self.pre_mlp_layernorm)
            self.self_attn_bda: Any = self._after(self.self_attn_bda, attention, mlp.enters)
            self.mlp_bda: Any = self._after(self.mlp_bda, mlp, False)

        def _stay_apart(self, module: torch.nn.Module, last: str, norm: Any) -> None:
            """Have a module of a region communicate nothing, and its norm be this rank's own."""
            row: Any = getattr(module, last, None)
            if row is None:
                raise ConfigError(
                    f"{DesyncResidual.flag()}: layer {self.layer_number - 1} has a "
                    f"{type(module).__name__} without {last}, whose partial sums would be kept"
                )
            keep_partial_sums(row)
            linears: Any = module.modules()
            for linear in linears:
                if isinstance(linear, layers.ColumnParallelLinear):
                    linear.allreduce_dgrad = linear.sequence_parallel = False
                    linear.disable_grad_reduce = True
                elif getattr(linear, "parallel_mode", None) == "column":  # TransformerEngine's
                    linear.parallel_mode, linear.sequence_parallel = None, False
            own: Any = type(norm)
            norm.__class__ = own_norm_class(own)
            norm.tp_group = self.pg_collection.tp
            for parameter in norm.parameters():
                parameter.sequence_parallel = False
                layers.set_tensor_model_parallel_attributes(parameter, True, 0, 1)

        def _after(self, build: Any, place: DesyncPlace, enters: bool) -> Any:
            """A bias-dropout-add for a module's place; ``enters``: the next one begins a region."""
            if not place.inside and not enters:
                return build

            def builder(training: bool, fused: bool) -> Add:
                add = build(training, fused)

                def step(
                    output_with_bias: tuple[Tensor, Tensor | None], stream: Tensor, dropout: float
                ) -> Tensor:
                    if place.leaves:
                        stream = stream / self.pg_collection.tp.size()
                    stream = add(output_with_bias, stream, dropout)
                    if place.leaves:
                        stream = self._leave(stream)
                    return self._enter(stream) if enters else stream

                return step

            return builder

        def _enter(self, stream: Tensor) -> Tensor:
            """A region begins."""
            group = self.pg_collection.tp
            if self.config.sequence_parallel:
                return mappings.gather_from_sequence_parallel_region(stream, group=group)
            return mappings.copy_to_tensor_model_parallel_region(stream, group=group)

        def _leave(self, addend: Tensor) -> Tensor:
            """A region ends: one stream of the ranks' addends."""
            group = self.pg_collection.tp
            if self.config.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(addend, group=group)
            return mappings.reduce_from_tensor_model_parallel_region(addend, group=group)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Megatron's forward, on this rank's stream where a region begins with it."""
            stream = self._enter(hidden_states) if self.enters else hidden_states
            return super().forward(stream, *args, **kwargs)

    DesyncLayer.__name__ = DesyncLayer.__qualname__ = f"Desync{base.__name__}"
    return DesyncLayer


@cache
def own_norm_class(base: Any) -> type:
    """A subclass of a norm whose weights differ between ranks; checkpoints have them one rank after
    another, ``[T h]``."""

    class OwnNorm(base):
        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            metadata = utils.ensure_metadata_has_dp_cp_group(metadata)
            state = self.state_dict(prefix="", keep_vars=True)
            sharded: dict[str, Any] = utils.make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {name: 0 for name, _ in self.named_parameters()},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            return sharded

    OwnNorm.__name__ = OwnNorm.__qualname__ = f"Own{base.__name__}"
    return OwnNorm
