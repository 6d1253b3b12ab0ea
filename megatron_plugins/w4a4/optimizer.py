"""Clips in Megatron's optimizer: never decayed, as all vectors, and with a multiple of the learning
rate where one is asked for."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey

from megatron_plugins import parameter_groups
from megatron_plugins.arguments import features_of
from megatron_plugins.seams import doors
from torch_plugins.config import W4A4

CLIPS = "*.input_quantizer.clip_*"


def with_clips(overrides: dict[Any, Any], config: Any) -> dict[Any, Any]:
    """``overrides`` of parameter groups, with a group for the clips where their rate differs.

    With the rate of all others they belong to the group without weight decay: a group that nothing
    tells apart would not be found again in a checkpoint.
    """
    multiple = features_of(doors.megatron_args())[W4A4.key()].clip_lr_mult
    if multiple == 1:
        return overrides
    parameter_groups.tell_apart()
    rates = {"max_lr": config.lr * multiple, "min_lr": (config.min_lr or 0.0) * multiple}
    return {**(overrides or {}), ParamKey(name=CLIPS): rates}
