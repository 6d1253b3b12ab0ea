"""The MLP of DS-MoE: N experts are one wide tensor-parallel MLP.

Megatron's own forward stays in charge; the scores multiply what goes into ``linear_fc2``, expert
block by expert block. A process has whole experts, N / T of T. Inference may compute fewer.

Shapes: S sequence, B batch, D hidden size, N experts, F width of one, T tensor-parallel size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_plugins.dense_moe import sharding
from megatron_plugins.dense_moe.projections import combine
from megatron_plugins.dense_moe.router import Router
from torch_plugins import dense_moe
from torch_plugins.config import DenseMoE


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
            config, group = self.config, self.tp_group
            if config.sequence_parallel and group.size() > 1:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            up, down = self.linear_fc1.weight, self.linear_fc2.weight
            out = dense_moe.sparse_mlp(
                x.flatten(0, 1),
                scores.flatten(0, 1)[:, self.own],
                kept.flatten(0, 1)[:, self.own],
                up.unflatten(0, (2, -1)) if config.gated_linear_unit else up,
                down,
                config.activation_func,
            ).unflatten(0, x.shape[:2])
            return combine(self.linear_fc2, out)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            return sharding.with_expert_keys(self, prefix, sharded_offsets, metadata)

    ExpertsMLP.__name__ = ExpertsMLP.__qualname__ = f"Experts{base.__name__}"
    return ExpertsMLP
