"""Rows of the operators that read memory once: fake quantization with kurtosis, and add + RMSNorm.

Fake quantization with two learned clips, and the kurtosis of every token of the same activation
(arXiv 2404.03605), in fp32; forward, and forward with backward, for random gradients of both.
Their formulas are in ``torch_plugins/ops/fake_quant.py`` and ``kurtosis.py``; here they stand as a
user would write them, for torch to run as they are and compiled.

A residual and an update in bf16, added, and the RMSNorm of the sum: of two operators of torch, of
transformers' module, and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from arms import Arm, Row, Tell, Unavailable, Wrong, may_fail, measure, native, relative_error
from limits import Limits
from names import ADD_NORM, COMPILED, EAGER, FEATURES, FUSED, HF_NORM
from timing import Effort
from torch import Tensor
from torch.nn import functional as F

BITS, EPS = 4, 1e-20
NORM_EPS = 1e-6
Results = tuple[Tensor, ...]


def fake_quant_and_kurtosis(x: Tensor, high: Tensor, low: Tensor) -> Results:
    """``xhat``, and K of every token, by torch's operators, with the straight-through gradient."""
    steps = (2**BITS - 1) / (high - low)
    places = (x.clamp(low, high) - low) * steps
    quantized = (places + (places.round() - places).detach()) / steps + low
    z = x - x.mean(-1, keepdim=True)
    squares = z * z
    below = squares.mean(-1) ** 2 + EPS
    return quantized, (squares * squares).mean(-1) / below


def fake_quant_rows(
    elements: Sequence[int], compiled: bool, effort: Effort, limits: Limits, tell: Tell
) -> Iterator[Row]:
    for count in elements:
        for phase in ("forward", "forward+backward"):
            tell(f"fake-quant + kurtosis, {count / 1e6:.1f}M elements, {phase}")
            arms = fake_quant_arms(count, phase != "forward", compiled, limits, tell)
            what = {"operator": "fake-quant + kurtosis", "shape": [count], "state": phase}
            yield measure(arms, effort, limits.threads, **what, tokens=count // FEATURES)


def fake_quant_arms(
    count: int, backward: bool, compiled: bool, limits: Limits, tell: Tell
) -> dict[str, Arm]:
    torch.manual_seed(0)
    x = torch.randn(count // FEATURES, FEATURES, requires_grad=backward)
    high, low = (torch.tensor(clip, requires_grad=backward) for clip in (2.5, -2.4))
    gradients = torch.randn(x.shape), torch.randn(x.shape[0])

    def arm(function: Callable[..., Results]) -> Callable[[], Results]:
        def forward() -> Results:
            return function(x, high, low)

        def both() -> Results:
            out = function(x, high, low)
            return *out, *torch.autograd.grad(out, (x, high, low), gradients)

        return both if backward else forward

    functions: dict[str, Callable[..., Results]] = {}
    with may_fail(FUSED, tell, True):
        (fused,) = native("fake_quant_kurtosis.fake_quant_kurtosis")
        functions[FUSED] = lambda *of: fused(*of, BITS, EPS)
    functions[EAGER] = fake_quant_and_kurtosis
    if compiled:
        functions[COMPILED] = torch.compile(fake_quant_and_kurtosis, dynamic=False)
    streams = 5 if backward else 2  # read x, write xhat; read x and the gradient, write dx
    seconds = limits.floor(4.0 * streams * x.numel(), copied=True)
    return checked({name: arm(f) for name, f in functions.items()}, EAGER, seconds, 1e-3, tell)


def norm_rows(
    tokens: Sequence[int], compiled: bool, effort: Effort, limits: Limits, tell: Tell
) -> Iterator[Row]:
    for rows in tokens:
        tell(f"add + RMSNorm, {rows} rows")
        arms = norm_arms(rows, compiled, limits, tell)
        what = {"operator": "add + RMSNorm", "shape": [FEATURES], "state": "warm"}
        yield measure(arms, effort, limits.threads, **what, tokens=rows)


def norm_arms(rows: int, compiled: bool, limits: Limits, tell: Tell) -> dict[str, Arm]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    residual, update = (torch.randn(rows, FEATURES).bfloat16() for _ in range(2))
    module = LlamaRMSNorm(FEATURES, NORM_EPS).bfloat16()
    weight = module.weight.detach()
    settled, nothing = residual + update, torch.zeros_like(update)

    def in_place() -> Results:
        settled.add_(nothing)  # it costs the same, and every call gives the same
        return settled, F.rms_norm(settled, (FEATURES,), weight, NORM_EPS)

    def theirs() -> Results:
        added = residual + update
        return added, module(added)

    arms: dict[str, Callable[[], Results]] = {ADD_NORM: in_place, HF_NORM: theirs}
    if compiled:
        arms[COMPILED] = torch.compile(theirs, dynamic=False)
    with may_fail(FUSED, tell, True):
        (fused,) = native("residual_add_rms_norm.residual_add_rms_norm")
        arms = {FUSED: lambda: fused(residual, update, weight, NORM_EPS), **arms}
    seconds = limits.floor(4.0 * 2 * residual.numel(), copied=True)
    return checked(arms, ADD_NORM, seconds, 0.02, tell)


def checked(
    calls: dict[str, Callable[[], Results]],
    base: str,
    floor: float | None,
    tolerance: float,
    tell: Tell,
) -> dict[str, Arm]:
    """Arms whose results are those of ``base``; raises Wrong where ours are not."""
    expected = [value.clone() for value in calls[base]()]
    arms = {}
    for name, call in calls.items():
        with may_fail(name, tell, name == FUSED):
            errors = [relative_error(f, e) for f, e in zip(call(), expected, strict=True)]
            if not max(errors) < tolerance:
                raise (Wrong if name == FUSED else Unavailable)(f"{name}: errors {errors}")
            arms[name] = Arm(_numbered(call), floor=floor, error=max(errors))
    return arms


def _numbered(call: Callable[[], Results]) -> Callable[[int], Results]:
    return lambda number: call()
