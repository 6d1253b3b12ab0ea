"""What must be in place before a feature may run."""

from __future__ import annotations

from megatron_plugins.seams import versions
from megatron_plugins.seams.ledger import HOOKS
from torch_plugins.config import ConfigError
from torch_plugins.seams import requirements


def require(key: str, flag: str) -> None:
    """Raise unless this Megatron is supported and every hook feature ``key`` needs is in place.

    Raises:
        ConfigError: names the flag, the missing symbol and the version at hand.
    """
    version = versions.installed()
    problem = versions.verdict(version)
    if problem and version and version[:2] < versions.OLDEST:
        raise ConfigError(f"{flag}: {problem}")
    host = f"megatron-core {versions.text(version)}"
    requirements.require(HOOKS, key, flag, host, "python -m megatron_plugins.doctor")
