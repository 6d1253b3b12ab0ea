"""The supported window of DeepSpeed."""

from __future__ import annotations

import importlib.metadata
import re
import sys

OLDEST = (0, 18, 6)
NEWEST = (0, 19)
AUTOTP_OLDEST = (0, 19, 6)
"""Whose AutoTP reads the decoder's plan, with norms on local heads and tied weights."""


def installed() -> tuple[int, ...] | None:
    """Version of the DeepSpeed that is imported, or of the one that would be."""
    module = sys.modules.get("deepspeed")
    version = getattr(module, "__version__", None)
    try:
        version = version or importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def verdict(version: tuple[int, ...] | None) -> str | None:
    """None inside the window; otherwise what is wrong with ``version`` and the remedy."""
    window = f"{text(OLDEST)} to {text(NEWEST)}"
    if version is None:
        return f"deepspeed is not installed; supported: {window}"
    if version < OLDEST:
        return f"deepspeed {text(version)} is older than the supported {window}: upgrade it"
    if version[:2] > NEWEST:
        return f"deepspeed {text(version)} is newer than the tested {window}"
    return None


def text(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version)) if version else "(not installed)"
