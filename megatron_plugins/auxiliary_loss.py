"""Auxiliary losses in Megatron's schedules: their gradients are weighted as the main loss's are.

Layers hold :class:`torch_plugins.auxiliary_loss.AuxiliaryLoss` and attach to their activations with
:func:`attach`. Megatron multiplies the main loss of a micro-batch by the loss scale, and divides it
by the number of micro-batches; so are these. With ``--calculate-per-token-loss`` it takes sums over
tokens instead, and divides by their number when all gradients are there: a mean over the tokens of
a micro-batch is multiplied by their number then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_plugins import auxiliary_loss
from torch_plugins.auxiliary_loss import AuxiliaryLoss, Scope

SCOPE = Scope("Megatron's own schedules do, which a script that calls backward by itself bypasses")
"""Of this process: its schedules run one model at a time, and its loss scale is one."""


def attach(
    activation: Tensor, loss: Tensor, term: AuxiliaryLoss, config: Any, tokens: int, share: float
) -> Tensor:
    """``activation``, whose backward pass also adds the gradient of a layer's loss.

    Args:
        loss: mean over the micro-batch.
        config: the layer's ``TransformerConfig``.
        tokens: of the micro-batch, over all tensor-parallel processes.
        share: of the loss that is this process's, where several add up their gradients.
    """
    term.scope = SCOPE
    factor = tokens if config.calculate_per_token_loss else 1
    return auxiliary_loss.attach(
        activation, loss, term.coefficient * factor * share, term.name, SCOPE
    )


def scale(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``forward_step_calc_loss``, which runs on every pipeline stage after each forward
    pass: what the schedule multiplies the main loss by."""
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    config: Any = call["config"]
    one = torch.ones((), device=torch.cuda.current_device())
    factor = one if config.grad_scale_func is None else config.grad_scale_func(one)
    if not config.calculate_per_token_loss:
        factor = factor / call["num_microbatches"]
    SCOPE.scale = factor.detach().reshape(())
    return original(*args, **kwargs)
