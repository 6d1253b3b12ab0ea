"""A GPT's checkpoint with shared keys and values, loaded into a hybrid model.

Megatron 0.19 and newer point what a hybrid model asks for at a GPT's checkpoint, in which layers
are stacked: their number is an axis of one tensor. Checkpoints with this feature number layers in
the keys, since layers differ; so the axis becomes part of the key.
"""

from __future__ import annotations

import re
from typing import Any

_STACKED = re.compile(r"decoder\.layers\.(?!\d)")


def translate(state: dict[str, Any]) -> None:
    """Number the layers of stacked tensors in ``state``, what a checkpoint is asked for. A model
    that shares has no such tensors of its own."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

    dict_list_map_inplace(_numbered, state)


def _numbered(entry: Any) -> Any:
    key = getattr(entry, "key", None)
    if not (isinstance(key, str) and _STACKED.search(key)):
        return entry
    if hasattr(entry, "build_fn"):
        build = entry.build_fn

        def build_numbered(*args: Any) -> Any:
            built = {"built": build(*args)}
            translate(built)
            return built["built"]

        entry.build_fn = build_numbered
        return entry
    layer = entry.global_offset[0]
    entry.key = _STACKED.sub(f"decoder.layers.{layer}.", key)
    if hasattr(entry, "prepend_axis_num"):
        entry.prepend_axis_num -= 1
        entry.axis_fragmentations = entry.axis_fragmentations[1:]
    # An object without another axis has one of size 1.
    alone = len(entry.global_shape) == 1 and not hasattr(entry, "prepend_axis_num")
    entry.global_shape = (1,) if alone else entry.global_shape[1:]
    entry.global_offset = (0,) if alone else entry.global_offset[1:]
    return entry
