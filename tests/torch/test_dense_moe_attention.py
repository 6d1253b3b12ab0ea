"""Sparse attention against dense heads with the scores of dropped experts 0, in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from torch_plugins.dense_moe import gate_heads
from torch_plugins.dense_moe_attention import chosen, sparse_attention, sparse_heads

B, S, D, A, J, P = 3, 6, 7, 4, 2, 5
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()


def layer(batch=B, tokens=S, keys=None):
    """Hidden states, q and o weights, keys, values, scores."""
    keys = keys or tokens
    x, q, o = draw(batch, tokens, D), draw(J * A * P, D), draw(D, J * A * P, seed=1)
    key, value = draw(batch, J, keys, P), draw(batch, J, keys, P, seed=1)
    return x, q, o, key, value, draw(batch, tokens, A, seed=2)


def gated_heads(x, q, o, key, value, scores, kept, mask, scale):
    """Every head of every token, weighted by hand; returns ``[B, S, D]`` and ungated heads."""
    length, keys = x.shape[1], key.shape[2]
    query = F.linear(x, q).unflatten(-1, (J * A, P))
    heads = []
    for h in range(J * A):
        products = query[:, :, h] @ key[:, h // A].transpose(1, 2) * scale
        if mask is None:
            future = torch.arange(keys) > torch.arange(length)[:, None] + keys - length
            products = products.masked_fill(future, -math.inf)
        elif mask.dtype == torch.bool:
            products = products.masked_fill(~mask[:, 0], -math.inf)
        else:
            products = products + mask[:, 0]
        heads.append(products.softmax(-1) @ value[:, h // A])
    heads = torch.stack(heads, 2)
    return F.linear(gate_heads(heads, scores * kept).flatten(2), o), heads


def ours(x, q, o, key, value, scores, kept, mask, scale):
    def query(group):
        own = q.unflatten(0, (J, A, P))[:, group.expert].flatten(0, 1)
        return F.linear(group.rows(x), own).unflatten(-1, (J, P)).transpose(1, 2)

    def output(expert, heads):
        return F.linear(heads, o.unflatten(1, (J, A, P))[:, :, expert].flatten(1))

    return sparse_attention(query, output, key, value, scores, kept, D, mask, scale)


def random_kept(batch=B, tokens=S):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, tokens, A, generator=generator) > 0.5


def some(batch, tokens, expert):
    kept = torch.zeros(batch, tokens, A, dtype=torch.bool)
    kept[..., expert] = True
    return kept


def one_token():
    kept = torch.zeros(B, S, A, dtype=torch.bool)
    kept[1, 4, 2] = True
    return kept


def ragged():
    """From no token of a sequence to all of the next, and a token without experts."""
    kept = random_kept()
    kept[0], kept[1, :, 1], kept[2, 3] = False, True, False
    return kept


KEPT = {
    "random": random_kept(),
    "all": torch.ones(B, S, A, dtype=torch.bool),
    "none": torch.zeros(B, S, A, dtype=torch.bool),
    "one expert": some(B, S, 3),
    "one token": one_token(),
    "ragged": ragged(),
}


def padding_mask(additive):
    """Causal; the first two keys of sequence 1 are padding, whose own rows see key 0."""
    visible = torch.ones(S, S, dtype=torch.bool).tril().repeat(B, 1, 1, 1)
    visible[1, :, :, :2] = False
    visible[1, :, :2, 0] = True
    if not additive:
        return visible
    return torch.zeros(visible.shape, dtype=torch.double).masked_fill(~visible, -1e30)


@pytest.mark.parametrize("mask", [None, False, True], ids=["causal", "bool", "additive"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_kept_experts_are_the_gated_heads(kept, mask):
    inputs = layer()
    mask = None if mask is None else padding_mask(mask)
    expected, heads = gated_heads(*inputs, kept, mask, 0.3)
    got = ours(*inputs, kept, mask, 0.3)
    torch.testing.assert_close(got, expected, **CLOSE)

    x, q, _, key, value, _ = inputs
    query = F.linear(x, q).unflatten(-1, (J * A, P))
    per_head = kept.repeat(1, 1, J).unsqueeze(-1)  # head j A + i
    found = sparse_heads(query, key, value, kept, mask, 0.3)
    torch.testing.assert_close(found, heads * per_head, **CLOSE)

    if kept.any():
        upstream = draw(B, S, D, seed=9).detach()
        want = torch.autograd.grad(expected, inputs, upstream)
        have = torch.autograd.grad(got, inputs, upstream)
        for mine, other in zip(have, want, strict=True):
            torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 9), (3, 9)])
def test_after_a_cache_the_last_token_sees_all_keys(tokens, keys):
    inputs, kept = layer(2, tokens, keys), random_kept(2, tokens)
    expected, _ = gated_heads(*inputs, kept, None, P**-0.5)
    torch.testing.assert_close(ours(*inputs, kept, None, None), expected, **CLOSE)


def test_only_the_chosen_tokens_are_computed():
    kept = ragged()
    for group in chosen(draw(B, S, A), kept):
        own = kept[..., group.expert]
        assert group.tokens_BL.shape == (B, int(own.sum(1).max()))
        for row, tokens, gates in zip(own, group.tokens_BL, group.gates_BL, strict=True):
            assert tokens[: row.sum()].tolist() == row.nonzero().flatten().tolist()
            assert (gates[row.sum() :] == 0).all()
    assert [group.expert for group in chosen(draw(B, S, A), some(B, S, 2))] == [2]


def test_a_mask_of_one_sequence_serves_all_and_one_of_heads_is_refused():
    inputs, kept = layer(), random_kept()
    causal = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    torch.testing.assert_close(ours(*inputs, kept, causal, None), ours(*inputs, kept, None, None))
    with pytest.raises(RuntimeError, match="size"):
        ours(*inputs, kept, causal.expand(1, J * A, S, S), None)
