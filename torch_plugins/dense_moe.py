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

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


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
    x_TD: Tensor, scores_TN: Tensor, up: Tensor, down_DNF: Tensor, activation: Activation
) -> Tensor:
    """All experts on all tokens, ``[T, D] -> [T, D]``.

    Args:
        up: ``[N F, D]``, experts one after another; ``[2, N F, D]`` with gates first, for experts
            ``down (activation(gate x) * up x)``.
        down_DNF: ``[D, N F]``, likewise.
    """
    inner = _inner(x_TD, up, activation).unflatten(-1, (scores_TN.shape[-1], -1))
    return F.linear((inner * scores_TN.unsqueeze(-1)).flatten(-2), down_DNF)


def _inner(x: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if up.dim() == 2:
        return activation(F.linear(x, up))
    gate, value = F.linear(x, up.flatten(0, 1)).chunk(2, -1)
    return activation(gate) * value


def sparse_mlp(
    x_TD: Tensor,
    scores_TN: Tensor,
    kept_TN: Tensor,
    up: Tensor,
    down_DNF: Tensor,
    activation: Activation,
) -> Tensor:
    """The experts of ``kept_TN`` only: :func:`dense_mlp` with the other scores 0, at the cost of
    those that are left.

    Tokens are grouped by expert, each group one matrix product; an expert that no token keeps costs
    nothing, and a token that keeps no expert gets zeros.

    Args:
        kept_TN: bool; see :func:`keep`.
    """
    experts = scores_TN.shape[-1]
    expert, token = kept_TN.t().nonzero(as_tuple=True)  # in the order of experts
    counts = kept_TN.sum(0).tolist()
    parts = x_TD[token].split(counts)
    ups = up.unflatten(-2, (experts, -1)).unbind(-3)
    downs = down_DNF.unflatten(-1, (experts, -1)).unbind(-2)
    weights = scores_TN[token, expert].unsqueeze(-1).split(counts)
    outputs = [
        F.linear(_inner(part, ups[i], activation) * weights[i], downs[i])
        for i, part in enumerate(parts)
        if counts[i]
    ]
    result = x_TD.new_zeros(x_TD.shape[0], down_DNF.shape[0])
    return result.index_add(0, token, torch.cat(outputs)) if outputs else result


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
def utilization(logits_TN: Tensor, threshold: float = 0.48) -> Utilization:
    """What a training log says of a router."""
    logits = logits_TN.flatten(0, -2).float()
    p = logits.softmax(-1)
    return Utilization(
        mutual_information=-mutual_information_loss(logits),
        conditional_entropy=torch.special.entr(p).sum(-1).mean(),
        share_N=p.mean(0),
        active_N=keep(p, threshold=threshold).float().mean(0),
    )


if __name__ == "__main__":
    from torch_plugins.dense_moe_cli import main

    main()
