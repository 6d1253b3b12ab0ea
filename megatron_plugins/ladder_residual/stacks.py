"""Ladder Residual on hybrid stacks (arXiv 2501.06589), whose layers are one module each.

Module i is layer i of the stack, and ``--ladder-layers`` names these: layer l of a GPT model is
attention 2 l and MLP 2 l + 1 of the stack ``*-*-``. A ladder layer reads the stream without the
output of the layer before it, which is still pending; the first layer of a stack has none before
it. So both must be attention, MLP or MoE layers. Mixers of other kinds (Mamba, gated delta net,
latent attention) stay as they are, outside the ladder.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch_plugins.config import ConfigError, LadderResidual

LADDERS = {"*": "attention", "-": "MLP", "E": "MoE"}
"""Layers that can be in a ladder, by their symbols."""


def check(symbols: Sequence[str], ladder: Collection[int], num_layers: int, first: int = 0) -> None:
    """Check the layers ``first``, ``first + 1``, ... of a stack, of these kinds.

    Raises:
        ConfigError: a ladder layer, or the one before it, cannot be in a ladder.
    """
    last = first + len(symbols)
    inside = {i for layer in ladder for i in (layer - 1, layer) if first <= i < last}
    other = sorted(i for i in inside if symbols[i - first] not in LADDERS)
    if other:
        kinds = ", ".join(f"{i} ({symbols[i - first]})" for i in other)
        can = [i for i in range(first + 1, last) if set(symbols[i - first - 1 :][:2]) <= {*LADDERS}]
        remedy = (
            f"of layers {first} to {last - 1}, {LadderResidual.flag('layers')} "
            f"{','.join(map(str, can))} can be"
            if can
            else "no two neighbours of this pattern are such layers"
        )
        raise ConfigError(
            f"{LadderResidual.flag()}: layers {kinds} of the hybrid stack are ladder layers or "
            f"before one, and only attention *, MLP - and MoE E layers can be; {remedy}"
        )
    if not set(ladder) - {0}:
        raise ConfigError(
            f"{LadderResidual.flag()} on a hybrid stack with no ladder layer behind layer 0, which "
            f"has none before it whose output could be pending: name at least one of 1 to "
            f"{num_layers - 1}"
        )
