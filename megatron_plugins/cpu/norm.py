"""Sequence parallelism with torch's own norms."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from megatron_plugins.cpu.piece import Piece, replace


def _torch_norm(module: ModuleType) -> None:
    norm_class = module.WrappedTorchNorm
    upstream = norm_class.__new__

    @functools.wraps(upstream)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return upstream(cls, config, *args, **kwargs)
        plain = _without_sequence_parallel(config)
        norm = upstream(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    replace(norm_class, "__new__", staticmethod(new))


def _without_sequence_parallel(config: Any) -> Any:
    """A view of the config with ``sequence_parallel`` off, free of ``__post_init__``."""
    plain = object.__new__(type(config))
    plain.__dict__.update(config.__dict__)
    plain.sequence_parallel = False
    return plain


PIECES = (
    Piece(
        "norm",
        "WrappedTorchNorm refuses sequence_parallel: the torch norm is built, and its parameters "
        "are marked as the apex and TransformerEngine norms mark theirs",
        "sequence parallel",
        modules={"megatron.core.transformer.torch_norm": _torch_norm},
    ),
)
