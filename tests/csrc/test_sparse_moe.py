"""A few chosen experts of many, in native code against references and a double-precision loop."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.conftest import EXAMPLES
from torch_plugins import dense_moe
from torch_plugins.ops import sparse_moe as ops
from torch_plugins.ops.int4 import pack_int4

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.torch_plugins
SIZES = [
    (1, 32, 4, 16, 2),
    (5, 33, 3, 7, 2),
    (70, 64, 8, 40, 3),
    (3, 100, 16, 130, 9),
    (4, 8, 1, 1, 1),
]
"""Tokens, hidden size, experts, width of one, and how many a token keeps on average."""


def choice(tokens, experts, keeps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    return scores, torch.rand(tokens, experts, generator=generator) < keeps / experts


def matrices(hidden, experts, width, gated, dtype=torch.float32, seed=0):
    """Gate, up and down; down is a view of one wide matrix."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(experts, width, hidden, generator=generator) for _ in range(2))
    wide = torch.randn(hidden, experts * width, generator=generator) / width**0.5
    down = wide.to(dtype).unflatten(1, (experts, width)).transpose(0, 1)
    gate, up = ((m / hidden**0.5).to(dtype) for m in (gate, up))
    return gate if gated else None, up, down


def int4(hidden, experts, width, gated, groups=1, seed=0):
    """gate_up, its scales, down, its scales."""
    generator = torch.Generator().manual_seed(seed)

    def weight(rows, columns, groups):
        codes = torch.randint(-8, 8, (experts, rows, columns), generator=generator)
        scale = torch.rand(experts, rows, groups, generator=generator)
        return pack_int4(codes.to(torch.int8)), (scale + 0.1) / (4 * columns**0.5)

    return *weight(width * (1 + gated), hidden, groups), *weight(hidden, width, 1)


def in_double(x, scores, kept, gate, up, down, activation):
    act, out = ops.ACTIVATIONS[activation], torch.zeros(*x.shape, dtype=torch.float64)
    for token, expert in kept.nonzero().tolist():
        row = x[token].double()
        inner = up[expert].double() @ row
        inner = act(inner) if gate is None else act(gate[expert].double() @ row) * inner
        out[token] += scores[token, expert].double() * (down[expert].double() @ inner)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_plain_weights_against_double(activation, gated, dtype):
    """Or as near as the reference, which rounds what is between its products."""
    bound = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for tokens, hidden, experts, width, keeps in SIZES:
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        scores, kept = choice(tokens, experts, keeps)
        weights = matrices(hidden, experts, width, gated, dtype)
        out = ops.sparse_moe(x, scores, kept, *weights, activation)
        expected = in_double(x, scores, kept, *weights, activation)
        reference = ops.sparse_moe_reference(x, scores, kept, *weights, activation)
        assert out.dtype == dtype
        most = max(bound * expected.abs().max(), 1.5 * (reference - expected).abs().max())
        assert (out - expected).abs().max() <= most


EXACT = ops.ACTIVATIONS | {  # torch's lose digits far below 0
    "gelu": lambda x: x * torch.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_activations(name):
    """One expert of one feature, so that only the activation is between input and output."""
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38])))
    one, ones = torch.ones(1, 1, 1), torch.ones(len(x), 1)
    found = ops.sparse_moe(x[:, None], ones, ones.bool(), None, one, one, name)[:, 0]
    few = [
        ops.sparse_moe(v.view(1, 1), *ones[None, :1], ones[:1].bool(), None, one, one, name)
        for v in x[::50]
    ]
    expected = EXACT[name](x.double())
    for out, want in ((found, expected), (torch.cat(few)[:, 0], expected[::50])):
        # e ** -u has the error of u times u, up to 12 ** 2 / 2, or more for the cubic one.
        assert ((out - want).abs() <= 3e-5 * want.abs() + 1e-30).all()
        near = x.abs() < 3 if out is found else x[::50].abs() < 3
        assert ((out - want).abs() <= 2e-6 * want.abs())[near].all()
    odd = torch.tensor([float("nan"), float("inf"), -200.0])[:, None]
    out = ops.sparse_moe(odd, ones[:3], ones[:3].bool(), None, one, one, name)
    assert out[0].isnan()
    assert out[1] == float("inf")
    assert out[2].abs() < 1e-30


@settings(max_examples=EXAMPLES // 4, deadline=None)
@given(
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 70),
    experts=st.integers(1, 6),
    width=st.integers(1, 40),
    gated=st.booleans(),
    bits=st.integers(2, 8),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
def test_int4_equals_the_reference(tokens, hidden, experts, width, gated, bits, dtype, seed):
    """Bit for bit with relu, which is exact; the other activations differ in the last place."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores, kept = choice(tokens, experts, 2, seed)
    weights = int4(hidden, experts, width, gated, 2 - hidden % 2, seed)
    rest = (gated, "relu", bits)
    expected = ops.w4a4_sparse_moe_reference(x, scores, kept, *weights, *rest)
    found = ops.w4a4_sparse_moe(x, scores, kept, *weights, *rest)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    packed = prepacked(weights, hidden, width)
    assert torch.equal(ops.w4a4_sparse_moe_prepacked(x, scores, kept, *packed, width, *rest), found)


def prepacked(weights, hidden, width):
    gate_up, gate_up_scale, down, down_scale = weights
    return (
        ops.prepack_experts(gate_up, gate_up_scale, hidden),
        ops.prepack_experts(down, down_scale, width),
    )


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_int4_with_every_activation(activation):
    """In eight bits, where an activation's last place moves a code by one in few places."""
    x = torch.randn(50, 64)
    scores, kept = choice(50, 8, 3)
    weights = int4(64, 8, 48, True)
    expected = ops.w4a4_sparse_moe_reference(x, scores, kept, *weights, True, activation, 8)
    found = ops.w4a4_sparse_moe(x, scores, kept, *weights, True, activation, 8)
    error = (found - expected).abs() / expected.abs().max()
    assert error.max() < 5e-3
    assert error.median() < 1e-6


def test_many_tokens_go_in_waves_and_threads_change_nothing(threads):
    """More pairs than one wave holds; one expert that all tokens keep, one that none keeps."""
    tokens, hidden, experts, width = 700, 80, 5, 24
    x, weights = torch.randn(tokens, hidden), matrices(hidden, experts, width, True)
    packed = prepacked(int4(hidden, experts, width, True), hidden, width)
    scores, kept = choice(tokens, experts, 2)
    kept[:, 1], kept[:, 3], kept[7] = True, False, False
    few = 25  # tokens; more go through torch's own products, whose last bit threads may change
    calls = (
        lambda: ops.sparse_moe(
            x[:few], scores[:few], kept[:few] & (kept[:few].cumsum(0) < 6), *weights
        ),
        lambda: ops.w4a4_sparse_moe_prepacked(x, scores, kept, *packed, width),
    )
    for call in calls:
        threads(1)
        alone = call()
        threads(2)
        assert torch.equal(call(), alone)
        assert not alone[7].any()
    expected = in_double(x, scores, kept, *weights, "silu")
    found = ops.sparse_moe(x, scores, kept, *weights)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert not found[7].any()


def test_nothing_to_do():
    weights = matrices(8, 3, 4, True)
    scores, kept = choice(5, 3, 2)
    none = torch.zeros_like(kept)
    assert not ops.sparse_moe(torch.randn(5, 8), scores, none, *weights).any()
    assert ops.sparse_moe(torch.zeros(0, 8), scores[:0], kept[:0], *weights).shape == (0, 8)
    empty = [m[:0] for m in weights]
    assert not ops.sparse_moe(torch.randn(5, 8), scores[:, :0], kept[:, :0], *empty).any()
    packed = [m[:0] for m in prepacked(int4(8, 3, 4, True), 8, 4)]
    x = torch.randn(5, 8)
    assert not ops.w4a4_sparse_moe_prepacked(x, scores[:, :0], kept[:, :0], *packed, 4).any()


X, (SCORES, KEPT), (GATE, UP, DOWN) = torch.randn(5, 8), choice(5, 3, 2), matrices(8, 3, 4, True)
WRONG = {
    "x is float64: must be": dict(x=X.double()),
    r"x has the shape \[8\]: must have 2 dimensions": dict(x=X[0]),
    r"scores has the shape \[5, 2\]: its dimension 1 must be 3": dict(scores=SCORES[:, :2]),
    r"scores has the shape \[4, 3\]: its dimension 0 must be 5": dict(scores=SCORES[:4]),
    "kept is float32: must be bool": dict(kept=KEPT.float()),
    r"kept has the shape \[5, 2\]": dict(kept=KEPT[:, :2]),
    "gate is bfloat16: must be float32": dict(gate=GATE.bfloat16()),
    r"gate has the shape \[3, 3, 8\]: its dimension 1 must be 4": dict(gate=GATE[:, :3]),
    r"up has the shape \[3, 4, 7\]: its dimension 2 must be 8": dict(up=UP[..., :7]),
    r"up has the shape \[4, 8\]: must have 3 dimensions": dict(up=UP[0]),
    r"down has the shape \[2, 8, 4\]: its dimension 0 must be 3": dict(down=DOWN[:2]),
    r"down has the shape \[3, 8, 3\]: its dimension 2 must be 4": dict(down=DOWN[..., :3]),
    "activation is swish: must be silu, gelu, gelu_tanh or relu": dict(activation="swish"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    given = dict(x=X, scores=SCORES, kept=KEPT, gate=GATE, up=UP, down=DOWN, activation="silu")
    with pytest.raises(RuntimeError, match=f"sparse_moe: {message}"):
        ops.sparse_moe(*(given | WRONG[message]).values())


def test_wrong_int4_arguments_are_named():
    plain = int4(8, 3, 4, True)
    packed = prepacked(plain, 8, 4)
    run = lambda *rest: ops.w4a4_sparse_moe_prepacked(X, SCORES, KEPT, *rest)  # noqa: E731
    for rest, message in (
        ((packed[0][:, :-1], packed[1], 4), "gate_up is damaged"),
        ((packed[0], packed[1][:2], 4), r"down has the shape .* its dimension 0 must be 3"),
        ((packed[0], packed[1], 3), "gate_up is a weight of 8 x 8, .* for 6 x 8"),
        ((packed[0], packed[1], 4, False), "gate_up is a weight of 8 x 8, .* for 4 x 8"),
        ((packed[1], packed[0], 4), "gate_up is a weight of 8 x 4"),
        ((packed[0], packed[1], -1), "width is -1"),
        ((*packed, 4, True, "silu", 1), "input_bits is 1: must be 2 to 8"),
    ):
        with pytest.raises(RuntimeError, match=f"w4a4_sparse_moe_prepacked: {message}"):
            run(*rest)
    gate_up, gate_up_scale, down, down_scale = plain
    rest = (X, SCORES, KEPT, gate_up, gate_up_scale.repeat(1, 1, 3), down, down_scale)
    with pytest.raises(RuntimeError, match="w4a4_sparse_moe: gate_up_scale has 3 columns"):
        ops.w4a4_sparse_moe(*rest)
    with pytest.raises(RuntimeError, match="gate_up has 7 rows: must be even"):
        ops.w4a4_sparse_moe(X, SCORES, KEPT, gate_up[:, 1:], gate_up_scale[:, 1:], down, down_scale)
    with pytest.raises(RuntimeError, match="sparse_moe has no gradient"):
        ops.sparse_moe(X.clone().requires_grad_(), SCORES, KEPT, GATE, UP, DOWN)


def test_conventions_of_operators():
    plain = int4(8, 3, 4, True)
    packed = prepacked(plain, 8, 4)
    tokens = (X, SCORES, KEPT)
    for gate in (GATE, None):
        torch.library.opcheck(OPS.sparse_moe.default, (*tokens, gate, UP, DOWN, "gelu"))
    torch.library.opcheck(OPS.w4a4_sparse_moe.default, (*tokens, *plain, True, "silu", 4))
    rest = (*packed, 4, True, "silu", 8)
    torch.library.opcheck(OPS.w4a4_sparse_moe_prepacked.default, (*tokens, *rest))


def test_compiled():
    packed = prepacked(int4(8, 3, 4, True), 8, 4)

    def run(x, scores, kept):
        out = ops.sparse_moe(x, scores, kept, GATE, UP, DOWN)
        return out + ops.w4a4_sparse_moe_prepacked(x * 2, scores, kept, *packed, 4)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, SCORES, KEPT), run(X, SCORES, KEPT))


@pytest.mark.parametrize(("tokens", "native"), [(1, True), (8, True), (9, False)])
def test_dense_moe_decodes_by_the_operator(tokens, native, monkeypatch):
    """And computes what it computes without."""
    if not ops.active("cpu"):
        pytest.skip("the package has not loaded the library itself")
    calls = []
    monkeypatch.setattr(
        ops, "sparse_moe", lambda *args: calls.append(args) or OPS.sparse_moe(*args)
    )
    gate, up, down = matrices(16, 4, 6, True)
    wide = (gate.flatten(0, 1), up.flatten(0, 1)), down.transpose(0, 1).flatten(1)
    x, (scores, kept) = torch.randn(tokens, 16), choice(tokens, 4, 2)
    for act, grad in product((F.silu, torch.nn.GELU(), torch.tanh), (False, True)):
        calls.clear()
        out = dense_moe.sparse_mlp(x.clone().requires_grad_(grad), scores, kept, *wide, act)
        assert bool(calls) == (native and not grad and act is not torch.tanh)
        expected = dense_moe.dense_mlp(x, scores * kept, *wide, act)
        assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()
