"""What W4A4's quantizers do in an engine's step: nothing yet, observe their inputs, or quantize.

Clips start at percentiles of the inputs of one step: over its micro-batches and all ranks, the
largest upper and the smallest lower one. They are written into the optimizer's fp32 copies before
that step updates the parameters, in which clips have no gradient: so a step that fp16 overflow
skips is observed again, and parameters and copies never differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_plugins import w4a4_groups
from deepspeed_plugins.features import SECTION
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.w4a4.quantizer import Mode, mode_at, quantizers_of, set_mode

KEY = W4A4.key()
CHECK_EVERY = 100
"""Steps between two checks of the clips, where the JSON has no ``steps_per_print``."""


class Quantizers:
    """Those of one engine's model.

    Args:
        settings: of the feature.
    """

    def __init__(self, engine: Any, settings: W4A4) -> None:
        self.settings = settings
        self.all = quantizers_of(engine.module)
        self.waiting: list[str] = []
        """Those whose clips wait for their percentiles."""
        self.read(engine)

    def read(self, engine: Any) -> None:
        """See which clips were never set, in a new engine or in one that has loaded a checkpoint.

        All ranks find the same, or they would wait for each other later.
        """
        if self.settings.learned:
            with gathered(self.all.values()):
                found = [float(quantizer.uncalibrated()) for quantizer in self.all.values()]
            flags = torch.tensor(found, device=engine.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            pairs = zip(self.all, flags.tolist(), strict=True)
            self.waiting = [name for name, flag in pairs if flag]
        self.set_mode(engine)

    def set_mode(self, engine: Any) -> None:
        mode = mode_at(self.settings, engine.global_steps, bool(self.waiting))
        set_mode(self.all.values(), mode)
        self.observing = mode is Mode.OBSERVE

    def calibrate(self, engine: Any) -> None:
        """Write the percentiles of the step that ends.

        Raises:
            ConfigError: a layer has seen no input.
        """
        high, low = self._everywhere(self.waiting, engine.device)
        for name, up, down in zip(self.waiting, high, low, strict=True):
            if not torch.isfinite(up - down):
                raise ConfigError(
                    f"{SECTION}.{KEY}.clip_init {self.settings.clip_init!r}: {name} saw no finite "
                    "input in the step that clips start from; give clip_init a value such as 4, or "
                    f"exclude the layer with modules '!{name.rpartition('.')[0]}'"
                )
            quantizer = self.all[name]
            for clip, value in quantizer.calibrate(up, down).items():
                write(quantizer.get_parameter(clip), value, engine)

    def _everywhere(self, names: list[str], device: Any) -> tuple[Tensor, Tensor]:
        """What the quantizers observed, over all ranks, by one reduction."""
        nothing = torch.full((2,), -torch.inf, device=device)
        largest = torch.stack(
            [
                torch.stack((seen[0], -seen[1])) if (seen := self.all[name].observed) else nothing
                for name in names
            ]
        )
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest[:, 0], -largest[:, 1]

    def check(self) -> None:
        """Raise where training has put clips in the wrong order.

        Raises:
            ConfigError: names the layer and the remedy.
        """
        if not self.settings.learned or not self.all:
            return
        with gathered(self.all.values()), torch.no_grad():
            pairs = torch.stack([torch.cat(each.clips()).float() for each in self.all.values()])
        for name, (high, low) in zip(self.all, pairs.tolist(), strict=True):
            if not high > low:
                raise ConfigError(
                    f"{SECTION}.{KEY}: the clips of {name} have become {high:g} and {low:g}, so "
                    f"that nothing lies between; lower clip_lr_mult "
                    f"({self.settings.clip_lr_mult:g}), or the learning rate"
                )


engines: WeakKeyDictionary[Any, Quantizers] = WeakKeyDictionary()


def start(engine: Any, settings: W4A4) -> None:
    """Take the quantizers of a new engine's model."""
    engines[engine] = Quantizers(engine, settings)
    if engine.optimizer is not None:
        w4a4_groups.follow_rates(engine.optimizer.param_groups)


def loaded(engine: Any) -> None:
    """Read the clips of a checkpoint, which may have been saved before they were measured."""
    if engine in engines:
        engines[engine].read(engine)


def step(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``DeepSpeedEngine._take_model_step``, at each optimizer step."""
    own = engines.get(engine)
    if own is None:
        return original(engine, *args, **kwargs)
    w4a4_groups.follow_rates(engine.optimizer.param_groups)
    observed = own.observing
    if observed:
        own.calibrate(engine)
    result = original(engine, *args, **kwargs)
    w4a4_groups.follow_rates(engine.optimizer.param_groups)
    if observed:
        own.read(engine)
    if not own.waiting and engine.global_steps % (engine.steps_per_print() or CHECK_EVERY) == 0:
        own.check()
    own.set_mode(engine)
    return result


def gathered(quantizers: Any) -> AbstractContextManager[Any]:
    """A context in which clips are whole on every rank: those that ZeRO 3 keeps whole are already,
    and leaving a context of its would take them apart."""
    clips = [clip for each in quantizers for clip in each.parameters() if not clip.numel()]
    if not clips:
        return nullcontext()
    from deepspeed import zero

    found: AbstractContextManager[Any] = zero.GatheredParameters(clips)
    return found


@torch.no_grad()
def write(clip: Any, value: Tensor, engine: Any) -> None:
    """Set a clip where the step that follows reads it: in the optimizer's fp32 copy, if it has one.

    Args:
        value: ``[1]``, fp32.
    """
    from deepspeed import utils, zero

    value = value.to(engine.device)
    if hasattr(clip, "ds_id"):
        if clip.requires_grad:  # one element: what lies behind it in a rank's part is padding
            utils.safe_set_local_fp32_param(clip, value.expand(clip.ds_tensor.numel()))
            return
        with zero.GatheredParameters([clip], modifier_rank=0):
            clip.copy_(value)
        return
    if hasattr(clip, "_hp_mapping") and clip.requires_grad:
        utils.safe_set_full_fp32_param(clip, value)
        return
    for copy in _copies(clip, engine.optimizer):
        copy.copy_(value)
    clip.copy_(value)


def _copies(clip: Tensor, optimizer: Any) -> Iterator[Tensor]:
    """The clip in the fp32 copies of DeepSpeed's optimizers for 16 bits without ZeRO."""
    for number, members in enumerate(getattr(optimizer, "fp16_groups", ())):
        at = 0
        for index, member in enumerate(members):
            if member is clip and hasattr(optimizer, "fp32_groups"):
                yield optimizer.fp32_groups[number][index].data
            elif member is clip:
                yield optimizer.fp32_groups_flat[number].data[at : at + 1]
            at += member.numel()
