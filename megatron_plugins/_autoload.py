"""Entry point of the ``torch.backends`` group: torch calls :func:`activate` at the end of its import.

Standard library only, no torch, and it never raises: an error here would break ``import torch``.
"""


def activate() -> None:
    """Arm the import watcher."""
