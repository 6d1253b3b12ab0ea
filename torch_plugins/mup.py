"""Maximal-update parametrization for torch, Hugging Face and DeepSpeed (arXiv 2408.13359, table 1).

Hyperparameters found on a narrow base model hold for a wide one when each kind of parameter scales
with the width multiplier ``m = hidden_size / base_width`` in its own way:

=========================  =======================================  =============================
                           forward pass                             here
=========================  =======================================  =============================
embedding                  output x m_emb                           init std, lr
attention scores           q k / d_head                             -
attention, MLP output      x m_res before the residual addition     -
hidden matrices            -                                        init std / sqrt(m), lr / m
logits                     / m                                      -
head                       -                                        init std, lr
norms and biases           -                                        lr
=========================  =======================================  =============================

The forward pass is a matter of the model's configuration: :func:`torch_plugins.hf.granite_config`
has it for Granite, whose fields are ``embedding_multiplier``, ``attention_multiplier``,
``residual_multiplier`` and ``logits_scaling``. Adam's epsilon is one for all. The row of the logits
and the ``1 / sqrt(2 L)`` of output projections in :func:`initialize` are not in table 1, but in the
code that trained the paper's models, and in Megatron's ``--use-mup``.

With Hugging Face Trainer, or DeepSpeed::

    config = granite_config("powerlm-3b", hidden_size=2304, ...)
    model = GraniteForCausalLM(config)
    m = config.logits_scaling
    initialize(model, config.initializer_range, m, num_layers=config.num_hidden_layers)
    groups = param_groups(model, lr=0.02, width_multiplier=m)

    Trainer(model, optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.95)), None), ...)
    deepspeed.initialize(model=model, model_parameters=groups, config=...)

Every scheduler that multiplies the rates of groups, as :class:`torch_plugins.power_lr.PowerLR` and
all of torch's do, keeps their proportions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torch_plugins.config import ConfigError

VECTOR, VOCABULARY, HIDDEN = "vector", "vocabulary", "hidden"
"""Kinds of parameters: norms and biases; embeddings and head; every other matrix."""


def param_groups(
    model: nn.Module,
    lr: float,
    width_multiplier: float,
    weight_decay: float = 0.1,
    head: str | None = "lm_head",
) -> list[dict[str, Any]]:
    """Parameter groups for Adam or AdamW: hidden matrices at ``lr / m``, all else at ``lr``.

    Weight decay, which torch multiplies by the group's rate, applies to matrices, the embedding and
    the head included, and not to norms and biases: Megatron's grouping, parameter for parameter.

    Args:
        model: before it is wrapped by a data-parallel engine; frozen parameters are left out.
        lr: rate of the base model, the one found by a search on it.
        width_multiplier: m.
        head: name of the module that makes the logits, or its last part; None where there is none.

    Returns:
        At most three groups, each with ``name`` (a kind, above), ``params``, ``lr`` and
        ``weight_decay``.

    Raises:
        ConfigError: there is no module ``head``, or the multiplier is not positive.
    """
    _check(width_multiplier)
    settings = {
        HIDDEN: (lr / width_multiplier, weight_decay),
        VOCABULARY: (lr, weight_decay),
        VECTOR: (lr, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in settings}
    for _, parameter, kind in _kinds(model, head):
        if parameter.requires_grad:
            members[kind].append(parameter)
    return [
        {"name": kind, "params": members[kind], "lr": rate, "weight_decay": decay}
        for kind, (rate, decay) in settings.items()
        if members[kind]
    ]


@torch.no_grad()
def initialize(
    model: nn.Module,
    std: float,
    width_multiplier: float,
    num_layers: int | None = None,
    head: str | None = "lm_head",
    output_projections: Sequence[str] = ("o_proj", "down_proj"),
    generator: torch.Generator | None = None,
) -> None:
    """Draw the weights anew: embeddings and head with ``std``, hidden matrices with
    ``std / sqrt(m)``; biases become zero, and norms stay as they are.

    Args:
        std: of the base model, 0.1 in the paper.
        width_multiplier: m.
        num_layers: L. Output projections then have ``std / sqrt(2 L m)``, as in Megatron; None:
            like other hidden matrices, as in table 1.
        head: see :func:`param_groups`.
        output_projections: parts of the names of matrices that write to the residual stream.

    Raises:
        ConfigError: there is no module ``head``, no output projection with ``num_layers``, or the
            multiplier is not positive.
    """
    _check(width_multiplier)
    projected = 0
    for name, parameter, kind in _kinds(model, head):
        if kind == VECTOR:
            if name.endswith("bias"):
                parameter.zero_()
            continue
        scale = math.sqrt(width_multiplier) if kind == HIDDEN else 1.0
        if num_layers is not None and not set(name.split(".")).isdisjoint(output_projections):
            projected += 1
            scale *= math.sqrt(2 * num_layers)
        nn.init.normal_(parameter, std=std / scale, generator=generator)
    if num_layers is not None and not projected:
        raise ConfigError(
            f"output_projections {list(output_projections)}: no parameter of this model is so "
            "named; name the matrices that write to the residual stream, or leave num_layers out"
        )


def _check(width_multiplier: float) -> None:
    if width_multiplier <= 0:
        raise ConfigError(
            f"width_multiplier {width_multiplier}: must be positive, hidden_size / base_width"
        )


def _kinds(model: nn.Module, head: str | None) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Name, parameter and kind; a head tied to the embedding comes once."""
    vocabulary: set[int] = set()
    headless = head is not None
    for name, module in model.named_modules():
        is_head = head is not None and (name == head or name.endswith(f".{head}"))
        headless = headless and not is_head
        if is_head or isinstance(module, nn.Embedding):
            vocabulary |= {id(parameter) for parameter in module.parameters(recurse=False)}
    if headless:
        raise ConfigError(
            f"head {head!r}: no module of this model is so named; name the one that makes the "
            "logits, whose rate does not shrink with the width, or give None"
        )
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1:
            yield name, parameter, VECTOR
        else:
            yield name, parameter, VOCABULARY if id(parameter) in vocabulary else HIDDEN
