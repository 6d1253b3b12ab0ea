"""Symbols of Megatron's TransformerEngine layers that the ladder touches, for the ledger."""

from __future__ import annotations

from torch_plugins.seams.symbol import Symbol

TRANSFORMER_ENGINE: tuple[Symbol, ...] = (
    Symbol(
        id="te-row-parallel",
        targets=("megatron.core.extensions.transformer_engine:TERowParallelLinear",),
        feature="ladder_residual",
        why="it reduces only in parallel_mode 'row', which it reads at each forward; the ladder "
        "clears it",
        remove_when="TERowParallelLinear returns a handle of an asynchronous reduction",
    ),
    Symbol(
        id="te-column-parallel",
        targets=("megatron.core.extensions.transformer_engine:TEColumnParallelLinear",),
        feature="ladder_residual",
        why="its backward launches dgrad's reduction on tp_group, and the ladder gives it a group "
        "that leaves it in flight",
        remove_when="a linear hands the reduction of its input's gradient out",
    ),
    Symbol(
        id="te-norm-linear",
        targets=("megatron.core.extensions.transformer_engine:TELayerNormColumnParallelLinear",),
        feature="ladder_residual",
        why="it waits for that reduction ahead of its norm, so the two are run apart",
        remove_when="with te-column-parallel",
    ),
    Symbol(
        id="te-norm",
        targets=("megatron.core.extensions.transformer_engine:TENorm",),
        feature="ladder_residual",
        why="the norm of such a linear, with the linear's weights",
        remove_when="with te-column-parallel",
        relies_on=("config", "hidden_size", "eps"),
    ),
)
