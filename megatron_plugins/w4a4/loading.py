"""Checkpoints without clips: quantization-aware training that goes on from a standard model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_plugins.arguments import features_of
from torch_plugins.config import W4A4, ConfigError

MARK = ".input_quantizer."

Clips = dict[str, dict[str, Any]]
"""What a checkpoint is asked for that it lacks: by model chunk, then by name."""


def set_aside(read_saved: Callable[[], Namespace], state: dict[str, Any], folder: str) -> Clips:
    """Take the clips out of ``state``, what a checkpoint is asked for, where it has none.

    Args:
        read_saved: the arguments of the checkpoint; called only if the run has clips.

    Raises:
        ConfigError: the optimizer's state is asked for too, which the checkpoint has for no clips.
    """
    chunks = {name: chunk for name, chunk in state.items() if name.startswith("model")}
    found = {
        name: {key: value for key, value in chunk.items() if MARK in key}
        for name, chunk in chunks.items()
    }
    if not any(found.values()):
        return {}
    saved = features_of(read_saved()).get(W4A4.key())
    if saved is not None and saved.learned:
        return {}
    if "optimizer" in state:
        raise ConfigError(
            f"checkpoint {folder} has no clips ({W4A4.flag()}), and no state of the optimizer for "
            "them: add --finetune, which starts from its weights, or --no-load-optim"
        )
    for name, clips in found.items():
        for key in clips:
            del state[name][key]
    return found


def put_back(clips: Clips, loaded: dict[str, Any]) -> None:
    """Complete a loaded state with the clips as they are."""
    for name, missing in clips.items():
        loaded[name].update({key: sharded.data for key, sharded in missing.items()})
