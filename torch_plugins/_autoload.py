"""Entry point of the ``torch.backends`` group: torch calls :func:`activate` at the end of its own
import, and so does ``import torch_plugins.hf``.

Standard library only, no torch, and it never raises: an error here would break ``import torch``.
"""

import os
import sys

_armed = False


def disabled() -> bool:
    """Whether ``TORCH_PLUGINS_DISABLE`` keeps the hooks into Hugging Face's libraries off."""
    return os.environ.get("TORCH_PLUGINS_DISABLE", "0") not in ("", "0")


def activate() -> None:
    """Arm the import watcher, once."""
    global _armed
    if _armed or disabled():
        return
    _armed = True
    try:
        from torch_plugins.seams import huggingface, patch

        patch.arm(huggingface.HOOKS)
        for module, mark, function in huggingface.REGISTRIES:
            patch.when_imported(module, mark, function)
    except Exception as error:
        print(f"torch_plugins is off, it failed to load: {error!r}", file=sys.stderr)
