"""The model of auxiliary_cases.py, and what plain torch makes of it with the sum of its losses."""

import torch
from engines import WIDTH
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_plugins.auxiliary_loss import AuxiliaryLoss

STEPS, RATE = 2, 0.5
COEFFICIENTS = (2.0, 3.0)
"""Of the two blocks: as much gradient as the main loss has."""


class Block(nn.Module):
    """A layer with a penalty on its activations."""

    def __init__(self, coefficient):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.penalty = AuxiliaryLoss("penalty", coefficient)

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        return self.penalty.attach(h, h.float().pow(4).mean())


class Split(Block):
    """Passes its output on in two tensors: a pipeline differentiates each by itself."""

    def forward(self, x):
        h = super().forward(sum(x) if isinstance(x, tuple) else x)
        return h / 4, h * 0.75


class Head(nn.Linear):
    def forward(self, x):
        return super().forward(sum(x) if isinstance(x, tuple) else x)


class Lost(Block):
    """Drops what attach returns."""

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        self.penalty.attach(h, h.pow(4).mean())
        return h


class Pass(nn.Module):
    """In place of an auxiliary loss."""

    def attach(self, activation, loss):
        return activation


class Net(nn.Module):
    """Two blocks between linear layers; ``run`` calls a block, perhaps through a checkpoint."""

    def __init__(self, run=lambda block, h: block(h), several=False):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(c) for c in COEFFICIENTS)
        self.last = nn.Linear(WIDTH, 1)
        self.run, self.several = run, several

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = self.run(block, h)
        y = self.last(h)
        return (y.pow(2).mean(), y) if self.several else y


def reentrant(block, h):
    return checkpoint(block, h, use_reentrant=True)


def non_reentrant(block, h):
    return checkpoint(block, h, use_reentrant=False)


def net(**options):
    torch.manual_seed(7)
    return Net(**options)


def data(step, rank, part, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    return torch.randn(2, WIDTH, generator=generator).to(dtype)


def losses(plain, x):
    """Main and auxiliary loss, the latter with and without coefficients, by torch alone."""
    h, weighted, raw = plain.first(x), 0, 0
    for block, coefficient in zip(plain.blocks, COEFFICIENTS, strict=True):
        h = torch.tanh(block.linear(h))
        weighted = weighted + coefficient * h.pow(4).mean()
        raw = raw + h.pow(4).mean()
    return plain.last(h).pow(2).mean(), weighted, raw


def reference(start, ranks, parts, auxiliary=True, steps=STEPS):
    """Parameters after steps of torch's SGD, and the auxiliary loss of each step."""
    plain, means = net(), []
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), start, strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for step in range(steps):
        found = [losses(plain, data(step, r, p)) for r in range(ranks) for p in range(parts)]
        total = sum(main + (weighted if auxiliary else 0) for main, weighted, _ in found)
        optimizer.zero_grad()
        (total / len(found)).backward()
        optimizer.step()
        means.append(sum(float(raw) for *_, raw in found) / len(found))
    return [p.detach().clone() for p in plain.parameters()], means


def flat(tensors, start):
    pairs = zip(tensors, start, strict=True)
    return torch.cat([(one.float() - other.float()).flatten() for one, other in pairs]).double()


def compare(start, end, ranks, parts, pick=lambda tensors: tensors):
    """How far an engine's update is from plain torch's: its relative error, the ratio of lengths,
    and the error that torch without auxiliary losses makes."""
    whole = [t.float() for t in start]
    expected = flat(pick(reference(whole, ranks, parts)[0]), pick(whole))
    without = flat(pick(reference(whole, ranks, parts, auxiliary=False)[0]), pick(whole))
    seen = flat(end, pick(whole))
    size = expected.norm()
    return {
        "error": float((seen - expected).norm() / size),
        "ratio": float(seen.norm() / size),
        "without": float((without - expected).norm() / size),
    }
