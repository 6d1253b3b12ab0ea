"""Combinations that cannot work: a table per feature, all offending rows in one error."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch_plugins.config import ConfigError


@dataclass(frozen=True)
class Refusal:
    """One combination. It applies when ``when(args)`` is true, args being fully validated."""

    flag: str
    """The other flag, as the user types it."""
    when: Callable[[Namespace], bool]
    reason: str
    """Why the two cannot work together, and what to do instead where there is something."""


def refuse(args: Namespace, feature_flag: str, table: Iterable[Refusal]) -> None:
    """Raise one :class:`ConfigError` that lists every row of ``table`` that applies to ``args``."""
    rows = [row for row in table if row.when(args)]
    if rows:
        lines = [f"  {feature_flag} with {row.flag}: {row.reason}" for row in rows]
        raise ConfigError(
            f"{feature_flag} cannot be combined with {', '.join(row.flag for row in rows)}:\n"
            + "\n".join(lines)
            + f"\nDrop {feature_flag} or the other flag."
        )


def on(name: str, *off: Any) -> Callable[[Namespace], bool]:
    """Whether an argument is present and set to something other than its ``off`` values."""
    return lambda args: getattr(args, name, None) not in (None, False, 0, *off)


def hybrid_model(args: Namespace) -> bool:
    """Whether the layers are those of a hybrid stack, by any of the options for it."""
    return any(
        on(name)(args)
        for name in ("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model")
    )


def cuda_graphs(args: Namespace) -> bool:
    """Whether layers are captured, by any of the options that the versions have for it."""
    return any(
        on(name, "none")(args)
        for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
    )
