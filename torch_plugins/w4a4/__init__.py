"""W4A4 (arXiv 2404.03605): linear layers that train for four bits, and their quantization.

``python -m torch_plugins.w4a4 quantize`` and ``report`` work on Hugging Face folders;
:func:`load_quantized` loads what ``quantize`` writes with four-bit weights in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .packed import W4A4Linear, load_quantized

__all__ = ["W4A4Linear", "load_quantized"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import packed

        return getattr(packed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
