"""W4A4's quantizers and linear layers of PyTorch against the formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_plugins.auxiliary_loss import Scope, bind
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.ops.dynamic_quant import e2m1, fake_quant_fp4, fake_quant_rows
from torch_plugins.ops.kurtosis import kurtosis, kurtosis_of_parts
from torch_plugins.w4a4.linear import FakeQuantLinear, swap
from torch_plugins.w4a4.quantizer import InputQuantizer, Mode, mode_at, quantizers_of

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows(bits: int) -> None:
    """Symmetric codes, 2 ** bits at most; zeros stay; the gradient passes."""
    x = values(5, 33).requires_grad_()
    found = fake_quant_rows(x, bits)
    scale = 2 * x.detach().abs().amax(-1, keepdim=True) / (2**bits - 1)
    codes = (x.detach() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    torch.testing.assert_close(found, codes * scale, rtol=0, atol=0)
    assert all(len(row.unique()) <= 2**bits for row in found.detach())
    (grad,) = torch.autograd.grad((found * values(5, 33, seed=1)).sum(), x)
    assert torch.equal(grad, values(5, 33, seed=1))
    assert torch.equal(fake_quant_rows(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_rows_of_a_part() -> None:
    """With the largest of the whole vector, a part is quantized as in the whole."""
    x = values(3, 16)
    whole, largest = fake_quant_rows(x), x.abs().amax(-1, keepdim=True)
    halves = [fake_quant_rows(half, largest=largest) for half in x.chunk(2, -1)]
    assert torch.equal(torch.cat(halves, -1), whole)
    assert not torch.equal(torch.cat([fake_quant_rows(h) for h in x.chunk(2, -1)], -1), whole)


def test_e2m1_rounds_to_the_nearest_and_ties_to_even() -> None:
    x = values(4000) * 4
    nearest = E2M1[(x.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)] * x.sign()
    assert torch.equal(e2m1(x), nearest)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0])
    assert torch.equal(e2m1(ties), even)


@pytest.mark.parametrize(("grid", "size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_fp4_blocks(grid: str, size: int) -> None:
    """Scales of each block, a power of two or in e4m3; then a value of E2M1."""
    x = (
        values(3, 4 * size) * torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)[:, None]
    ).float()
    x[1, :size] = 0
    found = fake_quant_fp4(x.requires_grad_(), grid)
    blocks = x.detach().unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    if grid == "mxfp4":
        scale = 2.0 ** (largest.clamp(min=1e-30).log2().floor() - 2)
    else:
        whole = largest.max() / (6 * 448)
        scale = (largest / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    scale = torch.where(largest == 0, 1, scale)
    expected = (e2m1(blocks / scale) * scale).flatten(-2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # An error of half a step of the coarsest kind at most, or what is beyond 6.
    rest = (found.detach() - x.detach()).unflatten(-1, (-1, size)).abs()
    assert (rest <= 2 * scale).all()
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def gather(parts: list[Tensor]) -> Any:
    """The moments of all, as if each were another process's."""
    from torch_plugins.ops import kurtosis as module

    return lambda own: torch.stack([torch.stack([module._moments(p)], 1) for p in parts])


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_kurtosis_of_parts(shift: float) -> None:
    """Value and gradient are those of the whole, also far from 0."""
    y = (
        values(4, 3, 24) * torch.linspace(0.5, 2, 24, dtype=torch.float64) + shift
    ).requires_grad_()
    weights = values(4, 3, seed=1)
    whole = kurtosis(y)
    (expected,) = torch.autograd.grad((whole * weights).sum(), y)
    parts = list(y.detach().chunk(3, -1))
    grads = []
    for part in parts:
        part.requires_grad_()
        found = kurtosis_of_parts([part], gather([p.detach() for p in parts]))[0]
        torch.testing.assert_close(found, whole.detach(), rtol=1e-9, atol=0)
        grads.append(torch.autograd.grad((found * weights).sum(), part)[0])
    torch.testing.assert_close(torch.cat(grads, -1), expected, rtol=1e-6, atol=1e-9)


def test_kurtosis_does_not_depend_on_the_size() -> None:
    y = values(8, 64).float()
    torch.testing.assert_close(kurtosis(y * 1e-3), kurtosis(y), rtol=1e-5, atol=0)
    assert torch.equal(kurtosis(torch.ones(2, 8)), torch.zeros(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.lm_head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.down_proj(F.silu(self.up_proj(x))))
        return out


def build() -> Mlp:
    torch.manual_seed(0)
    return Mlp().double()


def through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


def naive(model: Mlp, x: Tensor, feature: W4A4, penalties: list[Tensor]) -> Tensor:
    def layer(name: str, x: Tensor) -> Tensor:
        linear: Any = getattr(model, name)
        high, low = linear.input_quantizer.clip_high, linear.input_quantizer.clip_low
        steps = (2**feature.activation_bits - 1) / (high - low)
        place = (torch.minimum(torch.maximum(x, low), high) - low) * steps
        x = through(place, place.round()) / steps + low
        weight = linear.weight
        if feature.weight_bits:
            groups = weight.unflatten(1, (-1, feature.weight_group_size))
            scale = 2 * groups.detach().abs().amax(-1, keepdim=True) / (2**feature.weight_bits - 1)
            most = 2 ** (feature.weight_bits - 1)
            codes = (groups / scale).round().clamp(-most, most - 1)
            weight = through(groups, codes * scale).flatten(1)
        y = x @ weight.T + (0 if linear.bias is None else linear.bias)
        z = y - y.mean(-1, keepdim=True)
        penalties.append(((z**4).mean(-1) / (z**2).mean(-1) ** 2).mean())
        return y

    hidden = layer("up_proj", x)
    return model.lm_head(layer("down_proj", hidden * torch.sigmoid(hidden)))


@pytest.mark.parametrize("weight_bits", [0, 3])
def test_a_swapped_model(weight_bits: int) -> None:
    """Loss and all gradients, of clips and weights, with the penalty's; the head stays."""
    feature = W4A4(
        clip_init="1.5", kurtosis_weight=0.3, weight_bits=weight_bits, weight_group_size=8
    )
    model = build()
    assert swap(model, feature) == ["up_proj", "down_proj"]
    assert type(model.lm_head) is nn.Linear
    scope = Scope()
    bind(model, scope)
    scope.scale = 2.0
    x = values(7, 16)
    out = model(x)
    (out.square().mean() * 2).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    penalties: list[Tensor] = []
    expected = naive(model, x, feature, penalties)
    torch.testing.assert_close(out, expected)
    ((expected.square().mean() + 0.3 * sum(penalties)) * 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert set(scope.take()) == {"kurtosis_up_proj", "kurtosis_down_proj"}


@pytest.mark.parametrize(
    "settings",
    [
        dict(clip_init=1.5),
        dict(clip_init=1.5, symmetric=True, weight_bits=4),
        dict(granularity="token"),
    ],
    ids=["learned", "symmetric, weights", "each token"],
)
def test_a_swapped_model_compiles_whole(settings: dict[str, Any]) -> None:
    """Without a graph break, to the same bits; the penalty, which Python counts, breaks it."""
    model = build().float()
    swap(model, W4A4(kurtosis_weight=0, **settings))
    x = values(7, 16).float()
    outputs, grads = [], []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        outputs.append(run(x))
        outputs[-1].sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*outputs)
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_no_quantized_weight_is_kept() -> None:
    """For the backward pass the layer saves the weight itself."""
    model = build()
    swap(model, W4A4(clip_init="1.5", kurtosis_weight=0, weight_bits=4))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(values(3, 16))
    weights = {p.data_ptr() for p in model.parameters() if p.dim() == 2}
    wide = [x for x in saved if x.shape in ((32, 16), (16, 32), (4, 16))]
    assert wide
    assert {x.data_ptr() for x in wide} <= weights


def test_swapping_is_idempotent_and_selective() -> None:
    model = build()
    feature = W4A4(modules="*_proj,!down*")
    assert swap(model, feature) == swap(model, feature) == ["up_proj"]
    assert isinstance(model.up_proj, FakeQuantLinear)
    assert type(model.down_proj) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(modules="*linear_fc1"), "matches no linear layer of Mlp"),
        (dict(grid="mxfp4"), "up_proj has 16 input features here, not a multiple of 32"),
        (dict(weight_bits=4, weight_group_size=12), "weight_group_size.*16 input features"),
    ],
)
def test_what_cannot_be_swapped(settings: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(ConfigError, match=message):
        swap(model, W4A4(**settings))
    assert type(model.up_proj) is nn.Linear, "nothing is changed by an error"


def test_other_linear_layers_are_refused() -> None:
    class Own(nn.Linear):
        pass

    model = build()
    model.up_proj = Own(16, 32)
    with pytest.raises(ConfigError, match=r"up_proj is a .*Own, not a plain nn\.Linear"):
        swap(model, W4A4())


def test_modes_and_calibration() -> None:
    """Off and observing are the model without; the percentiles seen become the clips."""
    plain, model = build(), build()
    feature = W4A4(clip_init="percentile:90", kurtosis_weight=0)
    swap(model, feature)
    quantizers = quantizers_of(model)
    x = values(50, 16)
    for mode in (Mode.OFF, Mode.OBSERVE):
        for quantizer in quantizers.values():
            quantizer.mode = mode
        assert torch.equal(model(x), plain(x))
        model(x).sum().backward()
        assert all(q.clip_high.grad.item() == 0 for q in quantizers.values())
    first = quantizers["up_proj.input_quantizer"]
    assert first.uncalibrated()
    assert first.observed is not None
    high, low = (x.float().quantile(share).item() for share in (0.9, 0.1))
    assert [o.item() for o in first.observed] == pytest.approx([high, low])
    for name, value in first.calibrate(*first.observed).items():
        getattr(first, name).data.copy_(value)
    assert (first.clip_high.item(), first.clip_low.item()) == pytest.approx((high, low))
    assert not first.uncalibrated()
    model.eval()
    model(100 * x)
    assert first.observed is None, "evaluation is not observed"


def test_symmetric_levels() -> None:
    """Codes -8 to 7 in steps of 2 c / 15, 0 among them."""
    quantizer = InputQuantizer(W4A4(symmetric=True, clip_init="3"))
    x = torch.linspace(-5, 5, 4001)
    found = quantizer(x).detach().unique()
    torch.testing.assert_close(found, torch.arange(-8, 8) * (6 / 15), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "waiting", "modes"),
    [
        (0, False, "QQQQ"),
        (0, True, "EQQQ"),
        (2, False, "OOQQ"),
        (2, True, "OEQQ"),
    ],
)
def test_mode_at(start: int, waiting: bool, modes: str) -> None:
    names = {"O": Mode.OFF, "E": Mode.OBSERVE, "Q": Mode.QUANTIZE}
    found = []
    for iteration in range(4):
        found.append(mode_at(W4A4(start_iteration=start), iteration, waiting))
        waiting = waiting and found[-1] is not Mode.OBSERVE
    assert found == [names[letter] for letter in modes]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(activation_bits=1), "activation_bits.* 1: must be 2 to 8"),
        (dict(weight_bits=9), "weight_bits.* 9: must be 2 to 8"),
        (dict(granularity="tokens"), "did you mean 'token'"),
        (dict(grid="int8"), "did you mean 'int4'"),
        (dict(clip_init="percentile:40"), "above 50"),
        (dict(clip_init="-1"), "positive number"),
        (dict(clip_init="many"), "positive number"),
        (dict(clip_lr_mult=-1), "not negative"),
        (dict(kurtosis_weight=float("nan")), "not negative"),
        (dict(modules=" , "), "names no pattern"),
        (dict(weight_group_size=0), "at least 1"),
        (dict(start_iteration=-1), "must not be negative"),
        (dict(activation_bits=0, kurtosis_weight=0), "nothing is left to do"),
        (dict(symmetric=True, granularity="token"), "learned clips only"),
        (dict(grid="mxfp4", granularity="token"), "scales of its own"),
        (dict(grid="mxfp4", activation_bits=8), "has 4 bits"),
        (dict(grid="nvfp4", weight_bits=4), "use mxfp4"),
        (dict(grid="mxfp4", weight_bits=4, weight_group_size=64), "blocks of 32"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        W4A4(**settings)


def test_what_decides_the_function() -> None:
    same = [W4A4(), W4A4(clip_init=3, clip_lr_mult=2, kurtosis_weight=0, start_iteration=7)]
    assert same[0].function(4) == same[1].function(4)
    others = [
        W4A4(activation_bits=3),
        W4A4(symmetric=True),
        W4A4(weight_bits=4),
        W4A4(modules="a*"),
    ]
    functions = [other.function(4) for other in (*others, same[0], W4A4(granularity="token"))]
    assert all(functions.count(function) == 1 for function in functions)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "inputs 4 bits (learned clips from percentile:99.9), kurtosis 1e-05"),
        (
            dict(granularity="token", weight_bits=4, kurtosis_weight=0, start_iteration=9),
            "inputs 4 bits (scales of each token), weights 4 bits, from iteration 9",
        ),
        (dict(grid="nvfp4"), "inputs nvfp4 (scales of each block), kurtosis 1e-05"),
        (
            dict(symmetric=True, clip_init=4, activation_bits=3, kurtosis_weight=0),
            "inputs 3 bits (one learned clip from 4)",
        ),
    ],
)
def test_summary(settings: dict[str, Any], line: str) -> None:
    assert W4A4(**settings).summary() == line
