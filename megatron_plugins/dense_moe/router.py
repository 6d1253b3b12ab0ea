"""Routers of DS-MoE, with their loss and their statistics.

Every tensor-parallel process has the whole router, and computes the scores of the tokens it holds:
all of them, or its part of the sequence under sequence parallelism. The scores that it multiplies
its own experts or heads by are of all tokens; their gradients are added up over the processes.

Shapes: S sequence, B batch, D hidden size, N experts, R width inside an MLP router.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import utils
from torch import Tensor, nn

from megatron_plugins import auxiliary_loss
from megatron_plugins.dense_moe import statistics
from torch_plugins import dense_moe
from torch_plugins.auxiliary_loss import AuxiliaryLoss
from torch_plugins.config import DenseMoE


class Router(nn.Module):
    """``x -> S(x)``; parameters ``weight`` and, of an MLP router, ``hidden.weight``.

    Args:
        kind: ``mlp`` or ``attention``: whose loss weight and rule at inference it has.
        group: of tensor parallelism.
    """

    def __init__(self, config: Any, feature: DenseMoE, kind: str, group: Any) -> None:
        super().__init__()
        self.config, self.feature, self.kind, self.group = config, feature, kind, group
        attention = kind == "attention"
        self.experts = (feature.attention_experts if attention else feature.num_experts) or 0
        self.kept = feature.kept(attention)
        width = feature.router_hidden_size if feature.router == "mlp" else config.hidden_size
        self.weight = self._parameter(self.experts, width)
        if feature.router == "mlp":
            self.hidden = nn.Module()
            self.hidden.weight = self._parameter(width, config.hidden_size)
        weight = feature.mi_weight_attention if attention else feature.mi_weight_mlp
        self.loss = AuxiliaryLoss(f"mi_{kind}", weight) if weight else None

    def _parameter(self, rows: int, columns: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(rows, columns, dtype=torch.float32))
        if self.config.perform_initialization:
            self.config.init_method(parameter)
        parameter.data = parameter.data.to(self.config.params_dtype)
        # Each process has the gradients of its own tokens: Megatron adds them up.
        setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all tokens of the micro-batch, ``[S, B, N]``."""
        hidden: Any = self.hidden.weight if self.feature.router == "mlp" else None
        logits = dense_moe.router_logits(x, self.weight, hidden)
        scores = dense_moe.scores(logits)
        if torch.is_grad_enabled() and self.training:
            scores = self._with_loss(scores, logits)
        if self.group.size() == 1:
            return scores
        if self.config.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(scores, group=self.group)
        return mappings.copy_to_tensor_model_parallel_region(scores, group=self.group)

    def _with_loss(self, scores: Tensor, logits: Tensor) -> Tensor:
        """Attach the loss, and count the statistics."""
        sequence_parallel = self.config.sequence_parallel and self.group.size() > 1
        groups = [self.group] if sequence_parallel else []
        if self.feature.mi_reduction == "data-parallel":
            groups.append(parallel_state.get_data_parallel_group())
        marginal = dense_moe.shared_marginal(logits, *groups) if groups else None
        statistics.count(self.kind, dense_moe.utilization(logits, self.feature.threshold, marginal))
        if self.loss is None:
            return scores
        loss = dense_moe.mutual_information_loss(logits, marginal)
        processes = self.group.size() if sequence_parallel else 1
        tokens = logits[..., 0].numel() * processes
        return auxiliary_loss.attach(scores, loss, self.loss, self.config, tokens, 1 / processes)

    def keep(self, scores: Tensor) -> Tensor | None:
        """Which experts inference computes, ``[S, B, N]``; None: all, as ever in training."""
        if self.training or self.kept is None:
            return None
        flat = scores.flatten(0, 1)
        return dense_moe.keep(flat, *self.kept).view_as(scores)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The same on every tensor-parallel process."""
        metadata = utils.ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = utils.make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state
