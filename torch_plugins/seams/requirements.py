"""What must be in place before a feature may run."""

from __future__ import annotations

from collections.abc import Iterable

from torch_plugins.feature import ConfigError
from torch_plugins.seams import patch
from torch_plugins.seams.symbol import Symbol


def require(hooks: Iterable[Symbol], key: str, name: str, host: str, doctor: str) -> None:
    """Raise unless every hook that feature ``key`` needs is in place.

    Args:
        name: what the user wrote to turn the feature on.
        host: name and version of the package that should have the symbols.
        doctor: the command that says more.

    Raises:
        ConfigError: names the feature, the missing symbol and the version at hand.
    """
    for symbol in hooks:
        if symbol.feature in ("any", key) and patch.state(symbol) == "missing":
            cause = patch.failed.get(symbol.id)
            raise ConfigError(
                f"{name} needs {' or '.join(symbol.targets)} ({symbol.why}), known in "
                f"{symbol.versions}: missing in {host}"
                + (f" ({cause!r})" if cause else "")
                + f"; run {doctor}"
            )
