"""Cross-Layer Attention from DeepSpeed's JSON (arXiv 2405.12981)::

"deepspeed_plugins": {"cross_layer_attention": {"sharing_factor": 2}}
"""

from __future__ import annotations

from typing import Any

from deepspeed_plugins import conversion
from torch_plugins.config import CrossLayerAttention


def describe(settings: CrossLayerAttention, engine: Any) -> str:
    """``"2 of 4 layers share keys and values (producers 0, 2)"``.

    Raises:
        ConfigError: the engine's model shares otherwise.
    """

    def active(layers: int) -> str:
        producers = sorted(set(settings.resolve(layers)))
        line = f"{layers - len(producers)} of {layers} layers share keys and values "
        line += f"(producers {', '.join(map(str, producers))})"
        return line + (", kv norm of their own" if settings.kv_norm == "separate" else "")

    return conversion.describe(settings, engine, active)
