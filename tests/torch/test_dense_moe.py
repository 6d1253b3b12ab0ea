"""DS-MoE's equations against sums over experts, heads and tokens written out, in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from torch_plugins import dense_moe
from torch_plugins.dense_moe import (
    dense_mlp,
    gate_heads,
    keep,
    mutual_information_loss,
    scores,
    sparse_mlp,
    utilization,
)

T, D, N, WIDTH = 7, 5, 6, 3
gated = pytest.mark.parametrize("gated", [False, True])


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()


def layer(gated, tokens=T):
    """Tokens, logits of the router and both matrices."""
    up = draw(2, N * WIDTH, D) if gated else draw(N * WIDTH, D)
    return draw(tokens, D), draw(tokens, N, seed=1), up, draw(D, N * WIDTH)


def experts_one_by_one(x, S, up, down):
    """``sum_i S_i e_i(x)`` with each expert's own matrices, token by token."""
    rows = []
    for t in range(len(x)):
        total = torch.zeros(D, dtype=x.dtype)
        for i in range(N):
            own = slice(i * WIDTH, (i + 1) * WIDTH)
            if up.dim() == 3:
                hidden = F.silu(up[0, own] @ x[t]) * (up[1, own] @ x[t])
            else:
                hidden = F.gelu(up[own] @ x[t])
            total = total + S[t, i] * (down[:, own] @ hidden)
        rows.append(total)
    return torch.stack(rows)


def gradients(output, inputs):
    weights = draw(*output.shape, seed=9).detach()
    return torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True)


def activation(gated):
    return F.silu if gated else F.gelu


@gated
def test_one_wide_mlp_is_the_sum_over_experts(gated):
    x, logits, up, down = inputs = layer(gated)
    output = dense_mlp(x, scores(logits), up, down, activation(gated))
    expected = experts_one_by_one(x, logits.softmax(-1), up, down)
    torch.testing.assert_close(output, expected)
    ours, theirs = gradients(output, inputs), gradients(expected, inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert (ours[1] != 0).all()  # every score of every token trains


@gated
def test_all_experts_kept_is_the_dense_layer(gated):
    x, logits, up, down = inputs = layer(gated)
    S = scores(logits)
    dense = dense_mlp(x, S, up, down, activation(gated))
    for kept in (keep(S), keep(S, top_k=N), keep(S, threshold=0.0)):
        sparse = sparse_mlp(x, S, kept, up, down, activation(gated))
        torch.testing.assert_close(sparse, dense)
        grads = zip(gradients(sparse, inputs), gradients(dense, inputs), strict=True)
        for mine, other in grads:
            torch.testing.assert_close(mine, other)


KEPT = {
    "two each": lambda S: keep(S, top_k=2),
    "some": lambda S: keep(S, threshold=0.8),
    "one expert for all": lambda S: torch.arange(N).eq(4).expand_as(S),
    "a token without": lambda S: keep(S, top_k=1) & (torch.arange(len(S)) != 3).unsqueeze(1),
    "none": lambda S: torch.zeros_like(S, dtype=torch.bool),
}


@gated
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("limit", [-1, T], ids=["by group", "by run"])
def test_sparse_is_dense_with_the_other_scores_zero(gated, kept, limit, monkeypatch):
    """Not renormalized; in portions of three tokens, and for one token as for many."""
    monkeypatch.setattr(dense_moe, "ROWS_OF_A_CALL", limit)
    monkeypatch.setattr(dense_moe, "ROWS", 3)
    for tokens in (1, T):
        x, logits, up, down = inputs = layer(gated, tokens)
        S = scores(logits)
        mask = kept(S)
        expected = experts_one_by_one(x, S * mask, up, down)
        for weights in (up, tuple(up)) if gated else (up,):
            output = sparse_mlp(x, S, mask, weights, down, activation(gated))
            torch.testing.assert_close(output, expected)
        if not mask.any():
            continue
        for mine, other in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("limit", [-1, T], ids=["by group", "by run"])
def test_experts_that_no_token_keeps_are_not_read(limit, monkeypatch):
    monkeypatch.setattr(dense_moe, "ROWS_OF_A_CALL", limit)
    x, logits, up, down = layer(gated=True)
    mask = torch.arange(N).ge(4).expand(T, N)
    unread = torch.arange(N * WIDTH) < 4 * WIDTH
    up = up.masked_fill(unread.unsqueeze(-1), torch.nan)
    down = down.masked_fill(unread, torch.nan)
    assert sparse_mlp(x, scores(logits), mask, up, down, F.silu).isfinite().all()


def test_tokens_are_grouped_where_that_saves_more_than_a_call_costs(monkeypatch):
    """One expert for each of T tokens: in a run, each expert would compute T - 1 for nothing."""
    taken = []
    for form in ("_sparse_by_run", "_sparse_by_group"):
        monkeypatch.setattr(dense_moe, form, lambda *_, form=form: taken.append(form))
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 2, 29, 30):
            x, logits, up, down = (each.to(dtype) for each in layer(False, tokens))
            kept = torch.eye(tokens, dtype=torch.bool)
            sparse_mlp(x, logits, kept, up, down, F.gelu)
            sparse_mlp(x, logits, torch.ones_like(kept), up, down, F.gelu)
    by_run = [form == "_sparse_by_run" for form in taken]
    assert by_run[::2] == [True, *[False] * 3, *[True] * 3, False]
    assert all(by_run[1::2])  # all experts for all tokens: one run, nothing computed for nothing


def test_what_is_kept():
    S = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    assert keep(S).all()
    assert keep(S, threshold=0.48).tolist() == [
        [True, True, False, False],
        [True] * 4,
        [True, True, False, False],
    ]
    assert keep(S, top_k=1)[0].tolist() == [True, False, False, False]
    assert keep(S, top_k=3).sum(-1).tolist() == [3, 3, 3]
    # Under the threshold a token keeps (2 + 4 + 2) / 3 experts on average.
    assert keep(S, top_k=4, threshold=0.48).sum(-1).tolist() == [3, 3, 3]
    assert keep(S, top_k=2, threshold=0.48).sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"top_k": 5}, {"threshold": -0.1}, {"threshold": 1}]
)
def test_wrong_choices_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        keep(torch.full((2, 4), 0.25), **wrong)


def mutual_information_by_hand(logits):
    S = logits.softmax(-1)
    mean = [sum(S[t, i] for t in range(len(S))) / len(S) for i in range(N)]
    marginal = -sum(p * p.log() for p in mean)
    conditional = sum(-(S[t, i] * S[t, i].log()) for t in range(len(S)) for i in range(N)) / len(S)
    return -marginal + conditional


def test_mutual_information_and_its_gradient():
    logits = draw(T, N)
    loss, expected = mutual_information_loss(logits), mutual_information_by_hand(logits)
    torch.testing.assert_close(loss, expected)
    (mine,), (other,) = (torch.autograd.grad(each, logits) for each in (loss, expected))
    torch.testing.assert_close(mine, other)
    assert -math.log(N) < loss.item() < 0


def test_mutual_information_takes_the_marginal_of_all_processes():
    logits = draw(2 * T, N)
    marginal = logits.softmax(-1).mean(0)
    parts = [mutual_information_loss(part, marginal) for part in logits.split(T)]
    torch.testing.assert_close(sum(parts) / 2, mutual_information_loss(logits))
    alone = sum(mutual_information_loss(part) for part in logits.split(T)) / 2
    assert abs(alone - mutual_information_loss(logits)) > 1e-3


SURE = 200.0  # of fp32 scores, the others become 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("logits", "bound"),
    [
        (SURE * torch.eye(N).repeat(3, 1), -math.log(N)),
        (torch.zeros(T, N), 0.0),
        (SURE * torch.eye(N)[:1].repeat(T, 1), 0.0),
    ],
    ids=["balanced and sure", "uniform", "collapsed"],
)
def test_bounds_of_mutual_information(logits, bound, dtype):
    """Also where scores underflow: values and gradients stay finite."""
    logits = logits.to(dtype).requires_grad_()
    loss = mutual_information_loss(logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(bound, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


def attention(query, key, value):
    """Grouped-query attention, ``[heads, T, P]``; keys and values are repeated head by head."""
    repeats = len(query) // len(key)
    return F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeats, 0),
        value.repeat_interleave(repeats, 0),
        is_causal=True,
    )


def test_mixture_of_attention_heads():
    """Against experts one by one, each a multi-head attention of its own over shared keys."""
    A, J, P = 3, 2, 4
    query, key, value = draw(J * A, T, P), draw(J, T, P), draw(J, T, P, seed=2)
    logits, out = draw(T, A), draw(D, J * A * P)
    inputs = query, key, value, logits, out
    heads = attention(query, key, value).transpose(0, 1)
    mixed = F.linear(gate_heads(heads, scores(logits)).flatten(1), out)

    expected = torch.zeros(T, D, dtype=torch.double)
    projections = out.view(D, J, A, P)
    for i in range(A):
        for j in range(J):
            own = attention(query[None, j * A + i], key[None, j], value[None, j])[0]
            expected = expected + logits.softmax(-1)[:, i, None] * (own @ projections[:, j, i].T)
    torch.testing.assert_close(mixed, expected)
    for mine, other in zip(gradients(mixed, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, other)


def test_uniform_attention_experts_are_grouped_query_attention():
    A, J, P = 4, 2, 3
    heads = draw(T, J * A, P)
    uniform = scores(torch.zeros(T, A, dtype=torch.double))
    torch.testing.assert_close(gate_heads(heads, uniform), heads / A)


def test_utilization():
    logits = 200 * torch.eye(N)[:2].repeat(5, 1)  # two experts of six, in turn
    found = utilization(logits)
    assert found.mutual_information.item() == pytest.approx(math.log(2))
    assert found.conditional_entropy.item() == pytest.approx(0)
    assert found.share_N.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    assert found.active_N.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    assert not any(value.requires_grad for value in utilization(draw(T, N)))


def test_scores_are_summed_in_fp32():
    logits = torch.linspace(-4, 4, 64).to(torch.bfloat16).expand(3, -1)
    exact = logits.double().softmax(-1)
    assert scores(logits).dtype == torch.bfloat16
    torch.testing.assert_close(scores(logits).double(), exact, rtol=2**-8, atol=0)
