"""Tensors of the decoder under the names of a mixture-of-experts model of transformers.

The N experts of DS-MoE are one wide MLP; ``qwen2_moe`` and ``qwen3_moe`` keep each in matrices of
its own::

    mlp.up_proj.weight    [N F, D]    mlp.experts.0.up_proj.weight [F, D], ... (gate_proj likewise)
    mlp.down_proj.weight  [D, N F]    mlp.experts.0.down_proj.weight [D, F], ...
    mlp.router.weight     [N, D]      mlp.gate.weight [N, D]

A ``qwen2_moe`` has one more expert, which every token computes; here it is all zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .writer import Weights

WIDE = re.compile(r"(.*\.mlp)\.(gate_proj|up_proj|down_proj)\.weight")
ROUTER = re.compile(r"(.*\.mlp)\.router\.weight")

Make = Callable[[Tensor], Tensor]


class ExpertTensors:
    """The tensors of ``weights``, those of the experts split; made one at a time.

    Args:
        experts: N.
        shared_width: of the expert of zeros; None: the model has none.
    """

    def __init__(self, weights: Weights, experts: int, shared_width: int | None = None) -> None:
        self.weights = weights
        self._made: dict[str, tuple[str, Make]] = {}
        self._recent: tuple[str, Tensor] | None = None
        for name in weights:
            if wide := WIDE.fullmatch(name):
                for i in range(experts):
                    target = f"{wide[1]}.experts.{i}.{wide[2]}.weight"
                    self._made[target] = name, _expert(i, experts, int(wide[2] == "down_proj"))
            elif router := ROUTER.fullmatch(name):
                self._made[f"{router[1]}.gate.weight"] = name, lambda weight: weight
                if shared_width is not None:
                    self._add_zeros(name, router[1], shared_width)
            else:
                self._made[name] = name, lambda weight: weight

    def _add_zeros(self, router: str, mlp: str, width: int) -> None:
        for name, rows, columns in (
            ("shared_expert.gate_proj", width, None),
            ("shared_expert.up_proj", width, None),
            ("shared_expert.down_proj", None, width),
            ("shared_expert_gate", 1, None),
        ):
            self._made[f"{mlp}.{name}.weight"] = router, _zeros(rows, columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __getitem__(self, name: str) -> Tensor:
        source, make = self._made[name]
        if self._recent is None or self._recent[0] != source:
            self._recent = None  # before the next is read
            self._recent = source, self.weights[source]
        return make(self._recent[1])

    def meta(self, name: str) -> Tensor:
        source, make = self._made[name]
        return make(self.weights.meta(source))


def _expert(index: int, experts: int, dimension: int) -> Make:
    def make(wide: Tensor) -> Tensor:
        part = wide.chunk(experts, dimension)[index]
        return part.clone(memory_format=torch.contiguous_format)

    return make


def _zeros(rows: int | None, columns: int | None) -> Make:
    """``[rows, columns]`` with the hidden size for None, in the router's dtype."""

    def make(router: Tensor) -> Tensor:
        hidden = router.shape[1]
        shape = (hidden if size is None else size for size in (rows, columns))
        return router.new_zeros(*shape)

    return make
