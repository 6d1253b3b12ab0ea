"""Clips of W4A4 in the optimizer: groups of their own, without weight decay, which would draw clips
to 0, and at the rate of their layer's weight times ``clip_lr_mult``.

Each group that has weights with clips gets one group of clips. Two keys tell which belong together,
and before each step the rate of clips is set by that of their weights: schedulers that set the rate
of every group alike, such as DeepSpeed's WarmupLR, would lose the ratio.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from torch_plugins.w4a4.linear import FakeQuantLinear
from torch_plugins.w4a4_config import W4A4

WEIGHTS, CLIPS, MULT = "w4a4_weights", "w4a4_clips", "w4a4_clip_lr_mult"
PER_GROUP = ("base_lrs", "lr_lambdas", "max_lrs", "min_lrs", "_last_lr")
"""Attributes of torch's schedulers with an entry for each group."""

Group = dict[str, Any]


def give_clips(
    layers: Iterable[FakeQuantLinear], settings: W4A4, engine_arguments: dict[str, Any]
) -> None:
    """Put the clips of ``layers`` into what the script hands to the engine. They train where the
    weight of their layer does, and stay otherwise."""
    clips = {
        id(layer.weight): list(layer.input_quantizer.parameters())
        for layer in layers
        if layer.input_quantizer is not None
    }
    config = engine_arguments["config_class"]
    optimizer: Any = engine_arguments.get("optimizer")
    rate = (config.optimizer_params or {}).get("lr") if config.optimizer_name else None
    if hasattr(optimizer, "param_groups"):
        before = len(optimizer.param_groups)
        trained = _regroup(optimizer.param_groups, clips, settings.clip_lr_mult, None)
        _extend_schedulers(optimizer, before, engine_arguments.get("lr_scheduler"))
    else:
        trained = _regroup(_groups(engine_arguments), clips, settings.clip_lr_mult, rate)
    for weight, members in clips.items():
        for clip in members:
            clip.requires_grad_(weight in trained)


def _groups(engine_arguments: dict[str, Any]) -> list[Group]:
    """``model_parameters`` as groups, in place where they are some."""
    given: Any = engine_arguments.get("model_parameters")
    given = engine_arguments["model"].parameters() if given is None else given
    members = given if isinstance(given, list) else list(given)
    if not (members and isinstance(members[0], dict)):
        members = [{"params": members}]
    engine_arguments["model_parameters"] = members
    return members


def _regroup(
    groups: list[Group], clips: dict[int, list[nn.Parameter]], mult: float, rate: float | None
) -> set[int]:
    """Take clips out of the groups and append those of their own.

    Args:
        clips: by the id of their weight.
        rate: of groups that name none; None: the optimizer's default.

    Returns:
        The ids of the weights that train.
    """
    own = {id(clip) for members in clips.values() for clip in members}
    groups[:] = [group for group in groups if CLIPS not in group]
    added, trained = [], set()
    for number, group in enumerate(groups):
        members = [p for p in group["params"] if id(p) not in own]
        group["params"] = members
        ids = [id(p) for p in members if id(p) in clips and p.requires_grad]
        if not ids:
            continue
        group[WEIGHTS] = number
        new = {key: value for key, value in group.items() if key not in ("params", WEIGHTS)}
        for key in ("lr", "initial_lr"):
            base = group.get(key, rate if key == "lr" else None)
            if base is not None:
                new[key] = base * mult
        new |= {"params": [clip for weight in ids for clip in clips[weight]]}
        added.append(new | {"weight_decay": 0.0, CLIPS: number, MULT: mult})
        trained.update(ids)
    groups.extend(added)
    return trained


def _extend_schedulers(optimizer: Any, before: int, given: Any) -> None:
    """Give schedulers that the script has made for its optimizer an entry for each new group: they
    demand one, and what they make of it is replaced before the step."""
    if not any("initial_lr" in group for group in optimizer.param_groups):
        return  # which every scheduler sets
    found = [each for each in gc.get_objects() if issubclass(type(each), LRScheduler)]
    added = [group[CLIPS] for group in optimizer.param_groups[before:]]
    schedulers: dict[int, Any] = {id(each): each for each in (*found, given)}
    for scheduler in schedulers.values():
        if getattr(scheduler, "optimizer", None) is not optimizer:
            continue
        for name in PER_GROUP:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == before:
                values.extend(values[number] for number in added)


def follow_rates(groups: list[Group]) -> None:
    """Set the rate of clips by that of their weights."""
    of_weights = {group[WEIGHTS]: group for group in groups if WEIGHTS in group}
    for group in groups:
        if CLIPS in group and group[CLIPS] in of_weights:
            group["lr"] = of_weights[group[CLIPS]]["lr"] * group[MULT]
