"""Megatron's unmodified training loop on CPU and gloo, for tests, demos and debugging.

Opt-in: ``--cpu-backend`` on the command line, or ``MEGATRON_PLUGINS_CPU=1``. The CUDA device of
torch is made to mean the CPU, piece by piece; :data:`PIECES` names each with its reason. It changes
torch for the whole process, and refuses to do so where a GPU is present unless
``MEGATRON_PLUGINS_CPU=force``.

Importing this package is cheap and touches nothing; torch is imported by :func:`install`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_plugins.config import ConfigError

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_plugins.cpu.table import MODULE_PATCHES, PIECES

__all__ = ["FLAG", "MODULE_PATCHES", "PIECES", "VARIABLE", "adjust_args", "install", "wanted"]

FLAG = "--cpu-backend"
VARIABLE = "MEGATRON_PLUGINS_CPU"
_installed = False


def wanted(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether the command line or the environment asks for the CPU backend.

    Raises:
        ConfigError: the variable holds something else than 0, 1, force or nothing.
    """
    value = environ.get(VARIABLE, "").strip().lower()
    if value not in ("", "0", "1", "force"):
        raise ConfigError(f"{VARIABLE}={value!r}: use 1, 0 or force")
    return FLAG in argv or value in ("1", "force")


def installed() -> bool:
    """Whether this process runs on the CPU backend."""
    return _installed


def install(force: bool = False) -> None:
    """Redirect torch now and upstream's modules as they are imported. A second call does nothing.

    Args:
        force: also where a GPU is present; ``MEGATRON_PLUGINS_CPU=force`` says the same.

    Raises:
        ConfigError: a GPU is present.
    """
    global _installed
    if _installed:
        return
    force = force or os.environ.get(VARIABLE, "").strip().lower() == "force"
    if not force and gpu_present():
        raise ConfigError(
            f"{FLAG} ({VARIABLE}): a CUDA GPU is present, and the CPU backend would hide it from "
            f"the whole process; drop the flag to train on the GPU, hide the GPU with "
            f"CUDA_VISIBLE_DEVICES=, or say {VARIABLE}=force"
        )
    from megatron_plugins.cpu.table import MODULE_PATCHES, PIECES
    from torch_plugins.seams import watcher

    # Upstream fuses with torch.compile, whose C++ compilation would cost more than it saves here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for piece in PIECES:
        if piece.apply is not None:
            piece.apply()
    for module, patches in MODULE_PATCHES.items():
        for patch in patches:
            watcher.watch(module, patch)
    _installed = True


def adjust_args(args: Namespace) -> None:
    """Set Megatron's parsed, not yet validated options to what runs on a CPU; see :mod:`.args`.

    Raises:
        ConfigError: an option that cannot run on a CPU.
    """
    from megatron_plugins.cpu import args as options

    options.adjust_args(args)


def gpu_present() -> bool:
    """Whether torch sees a CUDA GPU; asked without starting CUDA."""
    import torch

    return torch.cuda.device_count() > 0


def __getattr__(name: str) -> Any:
    if name in ("MODULE_PATCHES", "PIECES"):
        from megatron_plugins.cpu import table

        return getattr(table, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
