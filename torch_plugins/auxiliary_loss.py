"""Auxiliary losses of a model whose loss somebody else computes: their gradients are injected.

A layer that adds ``c A`` to the objective (a load balance, a kurtosis) never sees the main loss.
It *attaches* ``A`` to one of its activations ``h``, on which the main loss depends. That is the
identity on ``h``; a backward pass that reaches it goes on into ``A`` as well, with the gradient

    s c,    s = what the host multiplies the main loss by before it differentiates

such as the loss scale of fp16 over the number of micro-batches of a step: the *scale*. So the
parameters receive the gradients of ``main loss + c A``, and means over processes follow by
themselves. Megatron-Core balances its experts in this way (``MoEAuxLossAutoScaler``).

Written in a model, and used by every host::

    self.kurtosis = AuxiliaryLoss("kurtosis", 0.05)      # in a layer's __init__
    hidden_states = self.kurtosis.attach(hidden_states, kurtosis(hidden_states))  # in its forward

    scope = Scope()                                      # in the host
    bind(model, scope)
    scope.scale = 1 / micro_batches                      # before each backward pass

Each forward pass injects once, also where the graph is used several times (``retain_graph``), and
under activation checkpointing of both kinds: what ran without gradients injects nothing, and its
recomputation does. Reentrant checkpointing with ``retain_graph`` recomputes, and so injects, in
every pass. Whether the module is in training mode makes no difference: evaluate under ``no_grad``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

UNBOUND = "bind the model to a Scope with torch_plugins.auxiliary_loss.bind and set its scale"


class Scope:
    """The losses of one model, as its host sees them.

    Args:
        remedy: what a user should do where no scale was set.
    """

    def __init__(self, remedy: str = UNBOUND) -> None:
        self.remedy = remedy
        self.scale: Tensor | float | None = None
        """``s`` of the backward pass that runs or comes next; a tensor has no dimensions, and is
        not read on the CPU. None: a pass that reaches a loss is an error."""
        self._sums: dict[str, Tensor] = {}
        self._attached: set[str] = set()
        self._injected: set[str] = set()

    def take(self) -> dict[str, Tensor]:
        """By name, the sum of the losses ``A`` injected since the last call, without ``c`` and
        ``s``, over layers and micro-batches; fp32, no dimensions."""
        sums, self._sums = self._sums, {}
        return sums

    def check(self) -> None:
        """Called after a backward pass.

        Raises:
            RuntimeError: a loss was attached, but no backward pass has ever come by.
        """
        lost = sorted(self._attached - self._injected)
        if lost:
            raise RuntimeError(
                f"auxiliary loss {', '.join(lost)}: attached to activations that the main loss "
                "does not depend on, so it trains nothing; go on with what attach returns"
            )

    def _inject(self, name: str, loss: Tensor, coefficient: float) -> Tensor:
        """Count ``loss``, and return its gradient ``s c``."""
        if self.scale is None:
            raise RuntimeError(
                f"auxiliary loss {name}: a backward pass reaches it, but nothing has set its scale "
                f"for that pass; {self.remedy}"
            )
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale.to(loss.device)
        self._injected.add(name)
        value = loss.float()
        self._sums[name] = (
            self._sums[name].to(value.device) + value if name in self._sums else value
        )
        exact = torch.promote_types(loss.dtype, torch.float32)
        factor = torch.full((), coefficient, dtype=exact, device=loss.device)
        return (factor * scale).to(loss.dtype)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, loss: Tensor, coefficient: float, name: str, scope: Scope
    ) -> Tensor:
        ctx.arguments, ctx.scope, ctx.done = (name, loss.detach(), coefficient), scope, False
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        injected = None if ctx.done else ctx.scope._inject(*ctx.arguments)
        ctx.done = True
        return gradient, injected, None, None, None


def attach(activation: Tensor, loss: Tensor, coefficient: float, name: str, scope: Scope) -> Tensor:
    """``activation``, whose backward pass also adds the gradient of ``coefficient * loss``.

    Only the returned tensor does so: go on with it.

    Args:
        activation: floating point, any shape; the main loss must depend on it.
        loss: no dimensions; a mean over the micro-batch, like the main loss.
        coefficient: the weight of ``loss`` beside the main loss.
        name: what it is logged as; losses of one name are summed.

    Raises:
        ValueError: ``loss`` is not a scalar, or cannot train anything although ``activation`` does.
    """
    if loss.dim() != 0:
        raise ValueError(
            f"auxiliary loss {name}: has shape {tuple(loss.shape)}; reduce it to a scalar"
        )
    if not torch.is_grad_enabled() or not (activation.requires_grad or loss.requires_grad):
        return activation
    if not loss.requires_grad:
        raise ValueError(
            f"auxiliary loss {name}: depends on nothing that is trained; do not detach what it is "
            "computed from, or leave it out where that is frozen"
        )
    scope._attached.add(name)
    return _Inject.apply(activation, loss, coefficient, name, scope)


class AuxiliaryLoss(nn.Module):
    """A loss that a layer adds to the objective; it has no parameters and no state.

    Args:
        name: what it is logged as; an identifier.
        coefficient: its weight beside the main loss; may be changed between steps.

    Raises:
        ValueError: ``name`` is no identifier.
    """

    scope: Scope
    """Of the host. A copy of the module starts with none: it belongs to another model."""

    def __init__(self, name: str, coefficient: float) -> None:
        super().__init__()
        if not name.isidentifier():
            raise ValueError(f"auxiliary loss {name!r}: its name must be an identifier")
        self.name = name
        self.coefficient = coefficient
        self.scope = Scope()

    def attach(self, activation: Tensor, loss: Tensor) -> Tensor:
        """See :func:`attach`."""
        return attach(activation, loss, self.coefficient, self.name, self.scope)

    def extra_repr(self) -> str:
        return f"{self.name}, coefficient={self.coefficient}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scope": Scope()}


def losses_of(model: nn.Module) -> list[AuxiliaryLoss]:
    """Every auxiliary loss in a model."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryLoss)]


def bind(model: nn.Module, scope: Scope) -> list[AuxiliaryLoss]:
    """Give the losses of ``model`` to ``scope``, and take them from any scope before."""
    found = losses_of(model)
    for loss in found:
        loss.scope = scope
    return found


def describe(losses: Iterable[AuxiliaryLoss]) -> str:
    """``"kurtosis (coefficient 0.05) in 4 modules"``."""
    counts: dict[tuple[str, float], int] = {}
    for loss in losses:
        key = (loss.name, loss.coefficient)
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(
        f"{name} (coefficient {coefficient:g}) in {count} module{'s' * (count > 1)}"
        for (name, coefficient), count in counts.items()
    )
