"""Rows of the linear layer: shapes, inputs of M tokens, weights in the cache or in memory.

*warm*: the same weight in every call, so that what fits in a cache comes from there. *cold*: each
call takes the next of so many copies that the last cache has forgotten a copy when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from arms import Arm, Row, Tell, Unavailable, Wrong, may_fail, measure, relative_error
from limits import Limits
from names import LINEAR
from peers import IN_TORCH, OF_OURS, Forward, Peer
from peers_ggml import PEER
from peers_installed import INSTALLED
from timing import Call, Effort
from torch import Tensor
from weights import Weight

Shape = Sequence[int]
"""K input and N output features."""

FORGOTTEN = 3
"""Times the last cache, that copies fill."""
UNKNOWN_CACHE = 64 * 2**20
MOST_BYTES = 2**30
MOST_ERROR = 0.3
"""Of a peer's output: four bits leave 0.2 of random weights."""


def chosen(installed: bool) -> tuple[Peer, ...]:
    """Ours first, then those in torch, then those in packages of their own."""
    return (*OF_OURS, *IN_TORCH, *((*INSTALLED, PEER) if installed else ()))


def rows(
    peers: Sequence[Peer],
    shapes: Sequence[Shape],
    tokens: Mapping[str, Sequence[int]],
    effort: Effort,
    limits: Limits,
    tell: Tell,
) -> Iterator[Row]:
    """One row for each shape, state and number of tokens.

    Args:
        tokens: M, for ``warm`` and for ``cold``.
    """
    for k, n in shapes:
        weight = Weight(k, n)
        for state, each_m in tokens.items():
            tell(f"{k} x {n} {state}: preparing the weights")
            ready = prepare(peers, weight, state == "cold", limits, tell)
            for m in each_m:
                tell(f"{k} x {n} {state}, {m} tokens")
                x = torch.randn(m, k).bfloat16()
                arms = arms_of(ready, weight, x, state == "cold", limits, tell)
                if arms:
                    what = {"operator": "linear", "shape": [k, n], "state": state, "tokens": m}
                    yield measure(arms, effort, limits.threads, **what)


def prepare(
    peers: Sequence[Peer], weight: Weight, cold: bool, limits: Limits, tell: Tell
) -> dict[Peer, list[Forward]]:
    """Copies of every peer that is there; one where warm."""
    ready = {}
    for peer in peers:
        count = copies(peer, weight, limits) if cold else 1
        with may_fail(peer.name, tell, peer.name in LINEAR):
            ready[peer] = [peer.prepare(weight, limits.threads) for _ in range(count)]
    return ready


def copies(peer: Peer, weight: Weight, limits: Limits) -> int:
    cache = limits.l3_bytes or UNKNOWN_CACHE
    wanted = min(FORGOTTEN * cache, MOST_BYTES)
    return 1 + max(1, round(wanted / (weight.k * weight.n * peer.bits / 8)))


def arms_of(
    ready: dict[Peer, list[Forward]],
    weight: Weight,
    x: Tensor,
    cold: bool,
    limits: Limits,
    tell: Tell,
) -> dict[str, Arm]:
    """The arms, after checking what each computes."""
    exact = x.float() @ weight.fp32.T
    arms = {}
    for peer, forwards in ready.items():
        with may_fail(peer.name, tell, peer.name in LINEAR):
            outputs = [forward(x) for forward in forwards]  # some prepare more in their first call
            found = outputs[0]
            error = relative_error(found, exact)
            if peer.name in LINEAR:
                check(peer.name, found, weight, x)
            elif not error < MOST_ERROR:
                raise Unavailable(f"its output is wrong, with an error of {error:.2f}")
            least = floor(peer, weight, x, cold, limits)
            arms[peer.name] = Arm(in_turn(forwards, x), peer.scheme, least, error)
    return arms


def in_turn(forwards: Sequence[Forward], x: Tensor) -> Call:
    count = len(forwards)
    if count == 1:
        only = forwards[0]
        return lambda number: only(x)
    return lambda number: forwards[number % count](x)


def floor(peer: Peer, weight: Weight, x: Tensor, cold: bool, limits: Limits) -> float | None:
    """Seconds at the machine's limit: the weight is read once, and inputs and outputs."""
    products = weight.k * weight.n
    read = products * peer.bits / 8 + 2 * x.shape[0] * (weight.k + weight.n)
    kind = "bf16" if "A16" in peer.scheme or peer.scheme == "bf16" else "int8"
    return limits.floor(read, 2 * x.shape[0] * products, kind, cold)


def check(name: str, found: Tensor, weight: Weight, x: Tensor) -> None:
    """Raises Wrong where ours is not its formula, of codes in fp32, up to bf16's rounding."""
    groups, bits = LINEAR[name]
    wide = x.float()
    scale = 2 * wide.abs().amax(-1, keepdim=True) / (2**bits - 1)
    codes = (wide / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    error = relative_error(found, (codes @ weight.dequantized(groups).T) * scale)
    if not error < 0.01:
        raise Wrong(f"{name} of {weight.k} x {weight.n}, {x.shape[0]} tokens: error {error:.3f}")
