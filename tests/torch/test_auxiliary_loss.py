"""Injected gradients of auxiliary losses against those of the sum of the losses, in fp64."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_plugins.auxiliary_loss import AuxiliaryLoss, Scope, attach, bind, describe, losses_of

COEFFICIENTS = (0.7, 1.3)


class Block(nn.Module):
    """A layer with a penalty on its activations and one on its weight."""

    def __init__(self, coefficient):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.penalty = AuxiliaryLoss("penalty", coefficient)
        self.size = AuxiliaryLoss("size", 0.1)

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        h = self.penalty.attach(h, h.pow(4).mean())
        return self.size.attach(h, self.linear.weight.square().sum())


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c) for c in COEFFICIENTS)
        self.run = run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x.square().sum()


def model(run=lambda block, x: block(x)):
    torch.manual_seed(0)
    return Net(run).double()


def batch():
    return torch.randn(3, 5, dtype=torch.float64, requires_grad=True)


def naive(net, x):
    """Main loss, weighted auxiliary losses, and their sums without coefficients."""
    weighted, penalty, size = 0, 0, 0
    for block, coefficient in zip(net.blocks, COEFFICIENTS, strict=True):
        x = torch.tanh(block.linear(x))
        penalty = penalty + x.pow(4).mean()
        size = size + block.linear.weight.square().sum()
        weighted = weighted + coefficient * x.pow(4).mean()
    return x.square().sum(), weighted + 0.1 * size, {"penalty": penalty, "size": size}


def gradients(loss, net, x, **options):
    return torch.autograd.grad(loss, [x, *net.parameters()], **options)


def bound(net, scale):
    scope = Scope()
    bind(net, scope)
    scope.scale = scale
    return scope


def assert_equal(seen, expected):
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


KINDS = {
    "none": lambda block, x: block(x),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(512.0)])
def test_gradients_are_those_of_the_sum(kind, scale):
    """The host multiplies the main loss by the scale; every parameter and the input agree."""
    net, x = model(KINDS[kind]), batch()
    scope = bound(net, scale)
    main, weighted, sums = naive(net, x)
    expected = gradients(scale * (main + weighted), net, x)
    (scale * net(x)).backward()
    assert_equal([x.grad, *(p.grad for p in net.parameters())], expected)
    found = scope.take()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in sums.items()}
    )
    assert scope.take() == {}
    scope.check()


def test_a_graph_that_is_used_twice_injects_once():
    net, x = model(), batch()
    scope = bound(net, 1.0)
    main, weighted, _ = naive(net, x)
    loss = net(x)
    first = gradients(loss, net, x, retain_graph=True)
    second = gradients(loss, net, x)
    assert_equal(first, gradients(main + weighted, net, x, retain_graph=True))
    assert_equal(second, gradients(main, net, x))
    assert len(scope.take()) == 2


def test_every_forward_pass_injects():
    net, x = model(), batch()
    scope = bound(net, 0.5)
    main, weighted, sums = naive(net, x)
    (0.5 * net(x) + 0.5 * net(x)).backward()
    assert_equal([x.grad], torch.autograd.grad(main + weighted, [x], retain_graph=True))
    assert float(scope.take()["penalty"]) == pytest.approx(2 * sums["penalty"].item())


def test_evaluation_injects_nothing_and_needs_no_scale():
    net, x = model(), batch()
    with torch.no_grad():
        net(x)
        h = torch.ones(2)
        assert attach(h, h.sum(), 1.0, "penalty", Scope()) is h
    with torch.inference_mode():
        net(torch.zeros(3, 5, dtype=torch.float64))
    scope = bound(net, None)
    net(x)
    assert scope.take() == {}
    frozen = model().requires_grad_(False)
    frozen(x.detach())
    assert losses_of(frozen)[0].scope.take() == {}


def test_a_backward_pass_without_a_scale_is_an_error():
    net = model()
    with pytest.raises(RuntimeError, match=r"auxiliary loss size: .* bind the model to a Scope"):
        net(batch()).backward()
    scope = Scope("ask the host")
    bind(net, scope)
    with pytest.raises(RuntimeError, match="ask the host"):
        net(batch()).backward()


def test_a_loss_that_reaches_nothing_is_an_error():
    scope = Scope()
    scope.scale = 1.0
    h = torch.ones(2, requires_grad=True)
    attach(h, h.pow(2).sum(), 1.0, "penalty", scope)
    h.sum().backward()
    with pytest.raises(RuntimeError, match=r"penalty: .* go on with what attach returns"):
        scope.check()


def test_wrong_losses():
    h = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"penalty: has shape \(2,\); reduce it"):
        attach(h, h * 2, 1.0, "penalty", Scope())
    with pytest.raises(ValueError, match="penalty: depends on nothing that is trained"):
        attach(h, h.detach().sum(), 1.0, "penalty", Scope())
    with pytest.raises(ValueError, match="'a b': its name must be an identifier"):
        AuxiliaryLoss("a b", 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_losses_keep_small_coefficients(dtype):
    """``s c`` is 1, and neither factor is rounded to ``dtype``, where they are infinite and 0."""
    h = torch.ones(2, dtype=dtype, requires_grad=True)
    scope = Scope()
    scope.scale = torch.tensor(1e8)
    attach(h, h.sum(), 1e-8, "penalty", scope).backward(torch.zeros_like(h))
    assert h.grad.tolist() == [1, 1]
    assert scope.take()["penalty"].dtype == torch.float32


def test_copies_belong_to_nobody():
    net = model()
    scope = bound(net, 1.0)
    for other in (copy.deepcopy(net.blocks[0]), pickle.loads(pickle.dumps(net.blocks[0]))):
        assert losses_of(other)[0].scope not in (scope, losses_of(net)[0].scope)
        with pytest.raises(RuntimeError, match="nothing has set its scale"):
            other(batch()).sum().backward()
    assert not [name for name in net.state_dict() if "linear" not in name]


def test_what_a_model_says_of_its_losses():
    counted = "penalty (coefficient 0.7) in 1 module, size (coefficient 0.1) in 2 modules, penalty"
    assert describe(losses_of(model())) == f"{counted} (coefficient 1.3) in 1 module"
    assert "AuxiliaryLoss(penalty, coefficient=0.7)" in repr(model())


def test_compiled_models_take_the_scale_of_each_pass():
    net, x = model(), batch()
    scope = bound(net, None)
    compiled = torch.compile(net, backend="aot_eager")
    for scale in (torch.tensor(1.0), torch.tensor(0.25)):
        loss = compiled(x)
        scope.scale = scale
        main, weighted, _ = naive(net, x)
        assert_equal(gradients(scale * loss, net, x), gradients(scale * (main + weighted), net, x))
