"""Rows of a layer of gated experts (SwiGLU), of which every token keeps k: ours and transformers'.

Tokens and their experts are drawn at random, several times; calls take turns with these draws, as
the tokens of a decoding model choose other experts each time. Every arm has the same weights,
tokens, experts and scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from arms import Arm, Row, Tell, Unavailable, Wrong, may_fail, measure, relative_error
from experts import Draw, Experts, Forward, Shape, ours, reference, theirs
from limits import Limits
from names import EAGER_EXPERTS, MOE_BF16, MOE_INT4
from timing import Call, Effort

DRAWS = 8
MOST_ERROR = 0.03
"""Of an output: bf16 leaves 0.005, and a code that rounds otherwise between the matrices more."""


def rows(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    effort: Effort,
    limits: Limits,
    tell: Tell,
) -> Iterator[Row]:
    for shape in shapes:
        experts = Experts.draw(shape)
        forwards = {**ours(experts, tell), **theirs(experts, shape)}
        for count in tokens:
            tell(f"sparse MoE {shape}, {count} tokens")
            draws = [draw(shape, count, seed) for seed in range(DRAWS)]
            arms = arms_of(forwards, draws, shape, experts, limits, tell)
            what = {"operator": "sparse MoE", "shape": list(shape), "state": "warm"}
            yield measure(arms, effort, limits.threads, **what, tokens=count)


def draw(shape: Shape, tokens: int, seed: int) -> Draw:
    """Scores far apart, so that all arms choose alike in bf16 too."""
    hidden, _, count, kept = shape
    torch.manual_seed(seed)
    order = torch.rand(tokens, count).argsort(-1)
    scores = (0.1 * order).softmax(-1).bfloat16()
    weights, index = scores.topk(kept, -1)
    x = torch.randn(tokens, hidden).bfloat16()
    return Draw(x, scores, order >= count - kept, weights, index)


def arms_of(
    forwards: dict[str, Forward],
    draws: Sequence[Draw],
    shape: Shape,
    experts: Experts,
    limits: Limits,
    tell: Tell,
) -> dict[str, Arm]:
    """The arms, after checking what each computes for the first draw."""
    expected = forwards[EAGER_EXPERTS](draws[0])
    arms = {}
    for name, forward in forwards.items():
        with may_fail(name, tell, name in (MOE_BF16, MOE_INT4)):
            found = forward(draws[0])
            error = own = relative_error(found, expected)
            if name == MOE_INT4:
                own = relative_error(found, reference(experts, draws[0]))
            if not own < MOST_ERROR:
                problem = Wrong if name in (MOE_BF16, MOE_INT4) else Unavailable
                raise problem(f"{name} of {shape}: an error of {own:.3f}")
            scheme = "W4A4" if name == MOE_INT4 else "bf16"
            least = floor(scheme, draws, shape, limits)
            arms[name] = Arm(in_turn(forward, draws), scheme, least, error)
    return arms


def in_turn(forward: Forward, draws: Sequence[Draw]) -> Call:
    return lambda number: forward(draws[number % len(draws)])


def floor(scheme: str, draws: Sequence[Draw], shape: Shape, limits: Limits) -> float | None:
    """Seconds at the machine's limit: the weights of the experts that some token keeps, once."""
    hidden, width, count, kept = shape
    one = 3 * hidden * width
    size = one * (0.5 if scheme == "W4A4" else 2)
    hit = sum(int(of.kept.any(0).sum()) for of in draws) / len(draws)
    operations = 2 * len(draws[0].x) * kept * one
    all_fit = limits.near(count * size)
    kind = "int8" if scheme == "W4A4" else "bf16"
    return limits.floor(hit * size, operations, kind, cold=not all_fit)
