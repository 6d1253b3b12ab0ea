"""A planted outlier channel, and which regularisation of W4A4 trains it away: a toy regression."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from torch_plugins.auxiliary_loss import Scope, bind
from torch_plugins.config import W4A4
from torch_plugins.w4a4.linear import swap
from torch_plugins.w4a4.quantizer import mode_at, quantizers_of, set_mode

OUTLIER, FACTOR, STEPS = 5, 20, 300


class Stream(nn.Module):
    """``read(write(x))``; a row of ``write`` is planted larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Linear(16, 32, bias=False)
        self.read = nn.Linear(32, 8, bias=False)
        with torch.no_grad():
            self.write.weight[OUTLIER] *= FACTOR

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.write(x))

    @torch.no_grad()
    def ratio(self, x: torch.Tensor) -> float:
        """Of the channels that ``read`` reads, by mean magnitude: the largest over the median."""
        sizes = nn.functional.linear(x, self.write.weight).abs().mean(0)
        return (sizes.max() / sizes.median()).item()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(feature: W4A4 | None) -> tuple[float, float, float]:
    """The ratio before and after, and the last loss over the first."""
    torch.manual_seed(0)
    model, scope = Stream(), Scope()
    x = torch.randn(256, 16)
    target = x @ torch.randn(16, 8) / 4
    before = model.ratio(x)
    if feature is not None:
        swap(model, feature)
        bind(model, scope)
        scope.scale = 1.0
    quantizers = quantizers_of(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(STEPS):
        if feature is not None:
            waiting = any(quantizer.uncalibrated() for quantizer in quantizers.values())
            set_mode(quantizers.values(), mode_at(feature, step, waiting))
        loss = (model(x) - target).square().mean()
        loss.backward()
        for quantizer in quantizers.values():
            if quantizer.observed is not None:
                for name, value in quantizer.calibrate(*quantizer.observed).items():
                    quantizer.get_parameter(name).data.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return before, model.ratio(x), losses[-1] / losses[0]


@pytest.mark.parametrize(
    ("feature", "falls"),
    [
        (None, False),
        (W4A4(kurtosis_weight=0), False),
        (W4A4(activation_bits=0, kurtosis_weight=0.3), True),
        (W4A4(kurtosis_weight=0.3), True),
    ],
    ids=["baseline", "inputs", "outputs", "both"],
)
def test_only_the_kurtosis_removes_a_planted_channel(feature: W4A4 | None, falls: bool) -> None:
    """The clips alone take half of it at most; and every arm learns its task."""
    before, after, loss = train(feature)
    assert before > 20
    assert after < 5 if falls else after > 8, after
    assert loss < 0.1
