"""Cross-Layer Attention from DeepSpeed's JSON (arXiv 2405.12981)::

"deepspeed_plugins": {"cross_layer_attention": {"sharing_factor": 2}}
"""

from __future__ import annotations

from typing import Any

from deepspeed_plugins import conversion
from torch_plugins.config import CrossLayerAttention


def describe(settings: CrossLayerAttention, engine: Any) -> str:
    """``"keys and values in 2 of 4 layers"``.

    Raises:
        ConfigError: the engine's model shares otherwise.
    """

    def active(layers: int) -> str:
        return f"keys and values in {len(set(settings.resolve(layers)))} of {layers} layers"

    return conversion.describe(settings, engine, active)
