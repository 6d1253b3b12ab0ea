"""Column-parallel linears whose collectives the ladder hides: TransformerEngine's.

Their backward launches dgrad's collective on the module's ``tp_group`` and waits for it after
wgrad, so a group that leaves it in flight serves here as it does for Megatron's own linears.

A linear that contains its norm waits between the two, inside one function. Here the norm and the
linear run one after the other, each as TransformerEngine has it for layers that keep them apart:
without FP8 the fused function calls the same kernels in the same order. Module and parameters stay
where they are, so that checkpoints, parameter order and optimizer states do not change.

With FP8 or FP4 both stay as they are: what they gather is quantized, and the fused norm quantizes
its own output.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from megatron_plugins.ladder_residual.linears import enter, leave


def is_te(linear: Any, config: Any) -> bool:
    """Whether a module is TransformerEngine's column-parallel linear, and not an expert's, in a
    model without FP8 and FP4."""
    quantized = any(getattr(config, name, None) for name in ("fp8", "fp4", "quant_recipe"))
    return getattr(linear, "parallel_mode", None) == "column" and not quantized


def te_class(linear: Any) -> type:
    """The class that overlaps, for a linear with a norm or without; a norm is taken apart."""
    own: Any = type(linear)
    if not hasattr(linear, "layer_norm_weight"):
        return _overlapping_class(own)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    norm: Any = TENorm(config=linear.config, hidden_size=linear.in_features, eps=linear.eps)
    norm_class: Any = type(norm)
    norm.__class__ = _stateless_class(norm_class)
    linear.ladder_norm, linear.save_original_input = norm, False
    norm_of(linear)
    return _apart_class(TEColumnParallelLinear, own.__name__)


def norm_of(linear: Any) -> Any:
    """The norm that was taken out of a linear, which computes with the linear's weights; or None.

    It is a module of its own for hooks that wait until a module's weights are there.
    """
    norm = getattr(linear, "ladder_norm", None)
    if norm is not None:
        norm.weight = linear.layer_norm_weight
        if linear.layer_norm_bias is not None:
            norm.bias = linear.layer_norm_bias
    return norm


@cache
def _stateless_class(base: Any) -> type:
    """A subclass of a norm with nothing of its own in a state dict."""

    class Stateless(base):
        def _save_to_state_dict(self, *_: Any) -> None: ...

        def _load_from_state_dict(self, *_: Any) -> None: ...

    Stateless.__name__ = Stateless.__qualname__ = base.__name__
    return Stateless


@cache
def _overlapping_class(base: Any) -> type:
    """A subclass of ``TEColumnParallelLinear`` that overlaps."""

    class Overlapping(base):
        tp_group: Any

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = self.tp_group
            x, self.tp_group = enter(self, x, own, self.sequence_parallel)
            try:
                output = super().forward(x, *args, **kwargs)
            finally:
                self.tp_group = own
            leave(self)
            return output

        ladder_owns_buffer = True

        def ladder_buffer(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
            """TransformerEngine gathers into a new one at each call."""
            return part.new_empty(shape)

    Overlapping.__name__ = Overlapping.__qualname__ = f"Overlapping{base.__name__}"
    return Overlapping


@cache
def _apart_class(base: Any, name: str) -> type:
    """The same behind a norm, under the name of the linear that contains it."""

    class Apart(_overlapping_class(base)):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(norm_of(self)(x), *args, **kwargs)

    Apart.__name__ = Apart.__qualname__ = name
    return Apart
