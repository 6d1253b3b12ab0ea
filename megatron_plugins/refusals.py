"""Combinations that cannot work: a table per feature, all offending rows in one error."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
