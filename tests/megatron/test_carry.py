"""What layers hand on, through activation recomputation: values and gradients, in any number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

from megatron_plugins import carry
from megatron_plugins.carry import Carry


def test_get_and_put() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert carry.get(None, "one") is None
    assert carry.put(None, {"one": None}) is None
    both = carry.put(carry.put(None, {"one": one}), {"two": two})
    assert both is not None
    assert carry.get(both, "one") is one
    assert carry.put(both, {"one": None}) == Carry({"two": two})
    assert carry.put(both, {"one": None, "two": None}) is None


def megatrons(function: Any, distribute: bool, *args: Any) -> Any:
    """Called like Megatron's: one argument of its own."""
    return checkpoint.checkpoint(function, *args, use_reentrant=True)


def transformer_engines(
    function: Any, distribute: bool, tracker: Any, group: Any, *args: Any
) -> Any:
    """Called like TransformerEngine's: three."""
    return checkpoint.checkpoint(function, *args, use_reentrant=True)


def layer(x: Tensor, mask: None, context: Carry | None, rope: Tensor) -> tuple[Tensor, Any]:
    """Uses one carried tensor twice, drops another, and hands two on."""
    a = carry.get(context, "a")
    x = x * rope if a is None else x * rope + a * a
    return x, carry.put(context, {"a": x.sin(), "b": x.cos(), "dropped": None})


def passes_on(x: Tensor, mask: None, context: Carry | None, rope: Tensor) -> tuple[Tensor, Any]:
    a, b = carry.get(context, "a"), carry.get(context, "b")
    assert a is not None
    assert b is not None
    return x + b, context


def last(x: Tensor, mask: None, context: Carry | None, rope: Tensor) -> tuple[Tensor, Any]:
    a = carry.get(context, "a")
    assert a is not None
    return x * a, None


@pytest.mark.parametrize("first", [None, Carry({"dropped": torch.ones(3)})], ids=["empty", "full"])
@pytest.mark.parametrize(
    ("checkpoint", "own"), [(megatrons, (False,)), (transformer_engines, (False, None, None))]
)
def test_recomputed_layers_give_the_same_bits(checkpoint: Any, own: Any, first: Any) -> None:
    results = []
    for recomputed in (False, True):
        x = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
        rope = torch.tensor([1.5, 0.5, 2.0], requires_grad=True)
        hidden, context = x * 1.0, first
        for one in (layer, layer, passes_on, last):
            args = (hidden, None, context, rope)
            if recomputed:
                hidden, context = carry.through_checkpoint(checkpoint, one, *own, *args)
            else:
                hidden, context = one(*args)
        assert context is None
        hidden.sum().backward()
        results.append((hidden.detach(), x.grad, rope.grad))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
        assert plain.abs().min() > 0


def test_what_carries_nothing_is_left_alone() -> None:
    x = torch.ones(2, requires_grad=True)
    out = carry.through_checkpoint(megatrons, lambda x: x * 2, False, x)
    assert torch.equal(out, torch.full((2,), 2.0))
    assert carry.through_checkpoint(megatrons, lambda x: (x, None), False, x)[1] is None
