"""The native operators of ``csrc/``: whether they were built, can be loaded, and are active.

An operator is ``torch.ops.torch_plugins.<name>`` with or without them: its Python reference serves
every device, and a library that is loaded takes over where it has a kernel of its own. Loading
happens with the first import of ``torch_plugins.ops``.

=========================  ======================================================================
``TORCH_PLUGINS_NATIVE=0``  nothing is loaded
``TORCH_PLUGINS_CPU=avx2``  the CPU library uses no better instructions: portable, avx2, avx512,
                            amx; neon
=========================  ======================================================================
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path

import torch

VARIABLE = "TORCH_PLUGINS_NATIVE"
FOLDER = Path(__file__).parent / "lib"


@cache
def load() -> dict[str, str]:
    """Load what was built, once; the state of each library, ``cpu`` and ``cuda``, in words."""
    return {kind: _load(kind) for kind in ("cpu", "cuda")}


def active(kind: str = "cpu") -> bool:
    """Whether the operators of ``cpu`` or ``cuda`` run in native code."""
    return load()[kind].startswith("active")


def _load(kind: str) -> str:
    library = FOLDER / f"libtorch_plugins_{kind}{'.dylib' if sys.platform == 'darwin' else '.so'}"
    if os.environ.get(VARIABLE) == "0":
        return f"off: {VARIABLE}=0"
    if not library.exists():
        return f"not built: operators run in Python (install with TORCH_PLUGINS_BUILD={kind})"
    if kind == "cuda" and not torch.cuda.is_available():
        return "built; no GPU here"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        warnings.warn(f"{library} cannot be loaded, operators run in Python: {error}", stacklevel=3)
        return f"cannot be loaded: {error}"
    if kind == "cuda":
        return "active"
    level = ctypes.CDLL(str(library)).torch_plugins_cpu_level
    level.restype = ctypes.c_char_p
    return f"active: {level().decode()}"
