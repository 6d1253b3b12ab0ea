"""The MLP of DS-MoE: N experts are one wide tensor-parallel MLP.

Megatron's own forward stays in charge; the scores multiply what goes into ``linear_fc2``, expert
block by expert block. A process has whole experts, N / T of T. Inference may compute fewer.

Shapes: S sequence, B batch, D hidden size, N experts, F width of one, T tensor-parallel size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_plugins.dense_moe import sharding
from megatron_plugins.dense_moe.projections import combine
from megatron_plugins.dense_moe.router import Router
from torch_plugins import dense_moe
from torch_plugins.config import DenseMoE
from torch_plugins.ops import sparse_moe  # noqa: F401  (dense_moe.sparse_mlp finds it)


@cache
def experts_class(base: type) -> type:
    """A subclass of Megatron's ``MLP`` whose blocks are experts."""

    mlp_class: Any = base

    class ExpertsMLP(mlp_class):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            feature: DenseMoE = config.megatron_plugins[DenseMoE.key()]
            self.router = Router(config, feature, "mlp", self.tp_group)
            experts, processes = self.router.experts, self.tp_group.size()
            first = self.tp_group.rank() * experts // processes
            self.own = slice(first, first + experts // processes)
            self._scores: Tensor | None = None
            self.packed: Any = None
            self.linear_fc2.register_forward_pre_hook(self._weigh)
            self.register_load_state_dict_pre_hook(sharding.take_one_extra_state)

        def _weigh(self, linear: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            """Multiply each expert's activations, ``[S, B, N F / T]``, by its score."""
            inner, scores = args[0], self._scores
            assert scores is not None
            own = scores[..., self.own].unsqueeze(-1)
            by_expert = inner.unflatten(-1, (own.shape[-2], -1))
            return ((by_expert * own).flatten(-2), *args[1:])

        def forward(
            self, hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            scores = self.router(hidden_states)
            kept = self.router.keep(scores)
            if kept is not None:
                return self._sparse(hidden_states, scores, kept), None
            self._scores = scores
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                self._scores = None

        def _sparse(self, x: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
            """The kept experts of this process, summed over the processes as ``linear_fc2``
            would."""
            group = self.tp_group
            if self.config.sequence_parallel and group.size() > 1:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            chosen = scores.flatten(0, 1)[:, self.own], kept.flatten(0, 1)[:, self.own]
            if self.packed is not None and not torch.is_grad_enabled():
                out = self.packed(x.flatten(0, 1), *chosen)
            else:
                up, down, _, activation = self.expert_weights()
                out = dense_moe.sparse_mlp(x.flatten(0, 1), *chosen, up, down, activation)
            return combine(self.linear_fc2, out.unflatten(0, x.shape[:2]))

        def expert_weights(self) -> tuple[Tensor, Tensor, int, Any]:
            """This process's matrices up and down, its number of experts, and their activation."""
            up, gated = self.linear_fc1.weight, self.config.gated_linear_unit
            ups = up.unflatten(0, (2, -1)) if gated else up
            experts = self.own.stop - self.own.start
            return ups, self.linear_fc2.weight, experts, self.config.activation_func

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            return sharding.with_expert_keys(self, prefix, sharded_offsets, metadata)

    ExpertsMLP.__name__ = ExpertsMLP.__qualname__ = f"Experts{base.__name__}"
    return ExpertsMLP
