"""The supported window of Megatron-Core, and what is known about the versions outside it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

OLDEST = (0, 17)
NEWEST = (0, 20)

OLDER = (
    "0.16.1 and older: the wheel has no megatron.training, hence no parser and no training loop to "
    "hook into; their checkouts build layers through other seams. "
    "Use megatron-core 0.17 or newer, which asks for Python 3.12"
)


def installed() -> tuple[int, int, int] | None:
    """Version of the Megatron-Core that ``import megatron.core`` gives, without importing it.

    Read from the source, not from package metadata: a checkout on PYTHONPATH shadows a wheel.
    """
    core = sys.modules.get("megatron.core")
    folders = getattr(core, "__path__", None)
    if folders is None:
        try:
            spec = importlib.util.find_spec("megatron.core")
        except ImportError:
            return None
        folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        source = Path(folder, "package_info.py")
        if source.exists():
            numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", source.read_text(), re.M))
            return int(numbers["MAJOR"]), int(numbers["MINOR"]), int(numbers["PATCH"])
    return None


def verdict(version: tuple[int, int, int] | None) -> str | None:
    """None inside the window; otherwise what is wrong with ``version`` and the remedy."""
    window = f"{text(OLDEST)} to {text(NEWEST)}"
    if version is None:
        return f"megatron-core is not installed; supported: {window}"
    if version[:2] < OLDEST:
        return f"megatron-core {text(version)} is older than the supported {window}. {OLDER}"
    if version[:2] > NEWEST:
        return f"megatron-core {text(version)} is newer than the tested {window}"
    return None


def text(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version)) if version else "(not installed)"
