"""Entry point of the ``torch.backends`` group: torch calls :func:`activate` at the end of its own
import.

Standard library only, no torch, and it never raises: an error here would break ``import torch``.
"""

import os
import sys

_armed = False


def disabled() -> bool:
    """Whether ``DEEPSPEED_PLUGINS_DISABLE`` keeps the plugins off."""
    return os.environ.get("DEEPSPEED_PLUGINS_DISABLE", "0") not in ("", "0")


def activate() -> None:
    """Arm the import watcher, once."""
    global _armed
    if _armed or disabled():
        return
    _armed = True
    try:
        from deepspeed_plugins.seams import ledger
        from torch_plugins.seams import patch

        patch.arm(ledger.HOOKS)
        for module, mark, function in ledger.REGISTRIES:
            patch.when_imported(module, mark, function)
    except Exception as error:
        print(f"deepspeed_plugins is off, it failed to load: {error!r}", file=sys.stderr)
