"""What must be in place before a feature may run."""

from __future__ import annotations

import warnings

from deepspeed_plugins.seams import versions
from deepspeed_plugins.seams.ledger import HOOKS
from torch_plugins.config import ConfigError
from torch_plugins.seams import requirements


def require(key: str, name: str) -> None:
    """Raise unless this DeepSpeed is supported and every hook feature ``key`` needs is in place; a
    newer DeepSpeed than was tested is a warning.

    Args:
        name: what the user wrote to turn the feature on.

    Raises:
        ConfigError: names the feature, the missing symbol and the version at hand.
    """
    version = versions.installed()
    problem = versions.verdict(version)
    if problem and version and version < versions.OLDEST:
        raise ConfigError(f"{name}: {problem}")
    host = f"deepspeed {versions.text(version)}"
    requirements.require(HOOKS, key, name, host, "python -m deepspeed_plugins.doctor")
    if problem:
        warnings.warn(f"{name}: {problem}", stacklevel=2)
