"""DS-MoE: every expert trains on every token, and inference computes the few that matter.

With ``S(x) = softmax(router(x))`` over all N experts,

    training    O(x) = sum_i S_i(x) e_i(x)                    over all experts (eqs. 1 and 3)
    inference   O(x) = sum_i S_i(x) e_i(x)                    over those kept, not renormalized

so training needs no top-k, no capacity and no dispatcher, and each expert gets a gradient from each
token. N experts of width F side by side are one MLP of width ``N F``, whose activations are
multiplied by their expert's score before the second matrix: the same sum, in two matrix products.

Mixture of attention heads: A experts of J query heads share J heads of keys and values; head j of
every expert attends to key-value head j, and expert i's heads are multiplied by its score before
the output projection (eqs. 7 and 8). Query heads lie key-value head first, ``j A + i``, as
grouped-query attention repeats them.

The mutual information between tokens and experts is maximized, by its negative as a loss:

    L_MI = -H(e) + mean over tokens of H(e | x),    p(e) = mean over tokens of S

between ``-log N``, each token sure of its expert and experts used alike, and 0, where the token
tells nothing: scores uniform, or all tokens on one expert. The paper leaves two things open. Which
tokens are the mean's: those of one call here, unless the caller gives ``p(e)``. And how layers add
up: as a sum.

Shapes: T tokens, D hidden size, N experts, F width of one expert, A attention experts, J heads of
one attention expert, P head dimension.

Paper: arXiv 2404.05567, section 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
Weights = Tensor | tuple[Tensor, Tensor]

ROWS_OF_A_CALL, ROWS_OF_A_CALL_16_BIT = 0.5, 28.0
"""Rows that an expert may as well compute for nothing, as that is what a product of its own costs;
measured on a CPU with ``examples/dense_moe/bench_sparse.py``."""
ROWS = 512
"""Gathered at a time: few fit the cache, and many save calls."""
NATIVE_ROWS = 8
"""Up to which the native operator is faster on a CPU: ``make bench-csrc``."""


def scores(logits_TN: Tensor) -> Tensor:
    """``S``: softmax over the experts, in fp32 or wider, in the dtype of the logits."""
    return logits_TN.softmax(-1, dtype=_wide(logits_TN)).to(logits_TN.dtype)


def router_logits(x: Tensor, weight: Tensor, hidden: Tensor | None = None) -> Tensor:
    """``weight x``, or ``weight gelu(hidden x)``, for any leading dimensions.

    The paper prints no router. Its parameter counts need two matrices with a width of 512 between
    them; without biases and with the experts' activation is our choice.

    Args:
        weight: ``[N, D]``, or ``[N, R]`` behind ``hidden`` ``[R, D]``.
    """
    return F.linear(x if hidden is None else F.gelu(F.linear(x, hidden)), weight)


def mutual_information_loss(logits_TN: Tensor, marginal_N: Tensor | None = None) -> Tensor:
    """``L_MI`` of a router, in nats: a scalar of fp32 or wider, from ``-log N`` to 0.

    Args:
        logits_TN: of the router, any leading dimensions. Finite: no entropy is taken of a score
            that has become 0.
        marginal_N: ``p(e)``, where its mean goes over more tokens than these, such as those of all
            data-parallel processes. It is not linear: a mean of losses is another loss.
    """
    wide = _wide(logits_TN)
    log_p = F.log_softmax(logits_TN.flatten(0, -2), -1, dtype=wide)
    p = log_p.exp()
    conditional = -(p * log_p).sum(-1).mean()
    marginal = p.mean(0) if marginal_N is None else marginal_N
    log_marginal = marginal.clamp_min(torch.finfo(wide).tiny).log()
    return (marginal * log_marginal).sum() + conditional


def shared_marginal(logits_TN: Tensor, *groups: dist.ProcessGroup) -> Tensor:
    """``p(e)`` over the tokens of all processes of ``groups``, which hold equally many.

    With it, the mean of :func:`mutual_information_loss` over the processes is that of all tokens,
    and so is the mean of its gradients: they flow into the own tokens only, as if these were all,
    and no collective runs in a backward pass.
    """
    own = logits_TN.flatten(0, -2).softmax(-1, dtype=_wide(logits_TN)).mean(0)
    shared = own.detach().clone()
    for group in groups:
        dist.all_reduce(shared, group=group)
        shared /= dist.get_world_size(group)
    return own + (shared - own.detach())


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def dense_mlp(
    x_TD: Tensor, scores_TN: Tensor, up: Weights, down_DNF: Tensor, activation: Activation
) -> Tensor:
    """All experts on all tokens, ``[T, D] -> [T, D]``.

    Args:
        up: ``[N F, D]``, experts one after another; ``[2, N F, D]`` or two matrices with the
            gates' first, for experts ``down (activation(gate x) * up x)``.
        down_DNF: ``[D, N F]``, likewise.
    """
    inner = _inner(x_TD, _matrices(up), activation).unflatten(-1, (scores_TN.shape[-1], -1))
    return F.linear((inner * scores_TN.unsqueeze(-1)).flatten(-2), down_DNF)


def _matrices(up: Weights) -> tuple[Tensor, ...]:
    return (up,) if isinstance(up, Tensor) and up.dim() == 2 else tuple(up)


def _inner(x: Tensor, up: Sequence[Tensor], activation: Activation) -> Tensor:
    inner = activation(F.linear(x, up[0]))
    return inner if len(up) == 1 else inner * F.linear(x, up[1])


def sparse_mlp(
    x_TD: Tensor,
    scores_TN: Tensor,
    kept_TN: Tensor,
    up: Weights,
    down_DNF: Tensor,
    activation: Activation,
) -> Tensor:
    """The experts of ``kept_TN`` only: :func:`dense_mlp` with the other scores 0, at the cost of
    those that are left.

    Few tokens cost what the experts' weights take to read, each once for all of them: no faster
    than dense by more than the share of experts that some token keeps; on a CPU without gradients
    they are one native operator, where that is built (:mod:`torch_plugins.ops.sparse_moe`). Many
    tokens are grouped by expert, each group one matrix product. An expert that no token keeps costs
    nothing, and a token that keeps no expert gets zeros.

    Args:
        kept_TN: bool; see :func:`keep`.
    """
    if x_TD.shape[0] <= NATIVE_ROWS:
        out = _sparse_by_operator(x_TD, scores_TN, kept_TN, _matrices(up), down_DNF, activation)
        if out is not None:
            return out
    counts = kept_TN.sum(0).tolist()
    spare = x_TD.shape[0] - sum(counts) / max(1, sum(count > 0 for count in counts))
    limit = ROWS_OF_A_CALL_16_BIT if x_TD.element_size() == 2 else ROWS_OF_A_CALL
    form = _sparse_by_run if spare <= limit else _sparse_by_group
    return form(x_TD, scores_TN, kept_TN, counts, _matrices(up), down_DNF, activation)


def _sparse_by_operator(
    x: Tensor,
    scores_TN: Tensor,
    kept_TN: Tensor,
    up: Sequence[Tensor],
    down: Tensor,
    activation: Activation,
) -> Tensor | None:
    """By the native operator; None where there is none for this, or the host did not import it:
    this file may lie in a model's folder, by itself."""
    ops = sys.modules.get("torch_plugins.ops.sparse_moe")
    if ops is None:
        return None
    name = ops.activation_name(activation)
    if name is None or not ops.runs_in_native_code(x, scores_TN, *up, down):
        return None
    experts = scores_TN.shape[-1]
    matrices = [matrix.unflatten(0, (experts, -1)) for matrix in up]
    gate = matrices[0] if len(matrices) == 2 else None
    down_NDF = down.unflatten(-1, (experts, -1)).transpose(0, 1)
    out: Tensor = ops.sparse_moe(x, scores_TN, kept_TN, gate, matrices[-1], down_NDF, name)
    return out


def _sparse_by_run(
    x: Tensor,
    scores_TN: Tensor,
    kept_TN: Tensor,
    counts: list[int],
    up: Sequence[Tensor],
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """All tokens through every run of neighbouring experts that one of them keeps.

    A run's weights are a slice of the wide ones, which nothing copies.
    """
    experts = scores_TN.shape[-1]
    width = down.shape[-1] // experts
    masked = scores_TN * kept_TN
    result = x.new_zeros(x.shape[0], down.shape[0])
    for start, end in _runs([count > 0 for count in counts]):
        own = slice(start * width, end * width)
        inner = _inner(x, [matrix[own] for matrix in up], activation)
        gated = inner.unflatten(-1, (end - start, width)) * masked[:, start:end].unsqueeze(-1)
        result = result + F.linear(gated.flatten(-2), down[:, own])
    return result


def _runs(hit: list[bool]) -> list[tuple[int, int]]:
    """Where values are true, from and to; everything where at most one in eight is false: one
    large product then takes no longer than its parts."""
    if sum(hit) * 8 >= len(hit) * 7:
        return [(0, len(hit))]
    edges = [i for i, (a, b) in enumerate(pairwise([False, *hit, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _sparse_by_group(
    x: Tensor,
    scores_TN: Tensor,
    kept_TN: Tensor,
    counts: list[int],
    up: Sequence[Tensor],
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """Every expert on the tokens that keep it, gathered and added up a portion at a time."""
    experts = scores_TN.shape[-1]
    expert, token = kept_TN.t().nonzero(as_tuple=True)  # in the order of experts
    weights = scores_TN[token, expert].unsqueeze(-1)
    ups = [matrix.unflatten(0, (experts, -1)).unbind(0) for matrix in up]
    downs = down.unflatten(-1, (experts, -1)).unbind(-2)
    result = x.new_zeros(x.shape[0], down.shape[0])
    for portion in _portions(counts):
        rows = token[portion[0].start : portion[-1].end]
        gathered = x.index_select(0, rows).split([group.end - group.start for group in portion])
        outputs = [
            F.linear(
                _inner(part, [matrices[i] for matrices in ups], activation) * weights[start:end],
                downs[i],
            )
            for (i, start, end), part in zip(portion, gathered, strict=True)
        ]
        result.index_add_(0, rows, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
    return result


class _Group(NamedTuple):
    expert: int
    start: int
    end: int


def _portions(counts: list[int]) -> list[list[_Group]]:
    """Experts with a token, in portions of up to ``ROWS`` tokens or one expert."""
    portions: list[list[_Group]] = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            if not portions or start + count - portions[-1][0].start > ROWS:
                portions.append([])
            portions[-1].append(_Group(expert, start, start + count))
            start += count
    return portions


def keep(scores_TN: Tensor, top_k: int | None = None, threshold: float | None = None) -> Tensor:
    """Which experts a token's inference computes, ``[T, N]`` of bool.

    ``threshold`` keeps ``N S_i > threshold``: a score against the uniform one, so that one number
    serves every N; the paper uses 0.48. ``top_k`` keeps the largest K. With both, K is the mean
    count of a token under the threshold, of these tokens, at most ``top_k``. With neither all stay.

    Raises:
        ValueError: K is not between 1 and N, or the threshold is not in [0, 1), where a token keeps
            one expert at least.
    """
    experts = scores_TN.shape[-1]
    if top_k is not None and not 1 <= top_k <= experts:
        raise ValueError(f"top_k {top_k}: must be between 1 and the {experts} experts")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(
            f"threshold {threshold}: must be at least 0 and below 1; it is compared with N times a "
            "score, which is 1 for a uniform router"
        )
    if threshold is not None:
        above = scores_TN * experts > threshold
        if top_k is None:
            return above
        top_k = min(top_k, max(1, round(above.sum(-1).float().mean().item())))
    if top_k is None:
        return torch.ones_like(scores_TN, dtype=torch.bool)
    chosen = scores_TN.topk(top_k, -1).indices
    return torch.zeros_like(scores_TN, dtype=torch.bool).scatter(-1, chosen, True)


def gate_heads(heads: Tensor, scores_TA: Tensor) -> Tensor:
    """Multiply the attention output of every head by its expert's score.

    Args:
        heads: ``[..., J A, P]``, heads in the order ``j A + i`` of expert i.
        scores_TA: ``[..., A]``, of the same tokens.
    """
    by_expert = heads.unflatten(-2, (-1, scores_TA.shape[-1]))
    return (by_expert * scores_TA.unsqueeze(-2).unsqueeze(-1)).flatten(-3, -2)


class Utilization(NamedTuple):
    """How a router spreads its tokens; scalars and ``[N]``, detached, fp32."""

    mutual_information: Tensor
    """``-L_MI``, from 0 to ``log N``."""
    conditional_entropy: Tensor
    """Mean over tokens of ``H(e | x)``: 0 where each is sure."""
    share_N: Tensor
    """``p(e)``; sums to 1."""
    active_N: Tensor
    """Share of the tokens that keep the expert at a threshold."""


@torch.no_grad()
def utilization(
    logits_TN: Tensor, threshold: float = 0.48, marginal_N: Tensor | None = None
) -> Utilization:
    """What a training log says of a router; ``marginal_N`` as in
    :func:`mutual_information_loss`."""
    logits = logits_TN.flatten(0, -2).float()
    p = logits.softmax(-1)
    return Utilization(
        mutual_information=-mutual_information_loss(logits, marginal_N),
        conditional_entropy=torch.special.entr(p).sum(-1).mean(),
        share_N=p.mean(0) if marginal_N is None else marginal_N,
        active_N=keep(p, threshold=threshold).float().mean(0),
    )


if __name__ == "__main__":
    from torch_plugins.dense_moe_cli import main

    main()
