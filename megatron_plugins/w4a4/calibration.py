"""When quantizers start, and where their clips do: around each step of Megatron's training loop.

Clips that start at percentiles wait for an iteration that is not quantized. After it, the upper and
lower percentiles that each quantizer saw become its clips: the largest and the smallest over the
micro-batches and over all processes that have it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_plugins.arguments import features_of
from megatron_plugins.seams import doors
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.w4a4.quantizer import InputQuantizer, Mode, mode_at, quantizers_of, set_mode

UNSEEN = float("-inf")


class Calibration:
    """The quantizers of a run's model chunks."""

    def __init__(self, model: Sequence[nn.Module], feature: W4A4) -> None:
        self.feature = feature
        self.quantizers: dict[str, InputQuantizer] = {}
        for number, chunk in enumerate(model):
            for name, quantizer in quantizers_of(chunk).items():
                self.quantizers[f"{number}.{name}"] = quantizer
        waiting = any(quantizer.uncalibrated() for quantizer in self.quantizers.values())
        everywhere = torch.tensor(float(waiting), device=torch.cuda.current_device())
        if dist.is_initialized():
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
        self.waiting = bool(everywhere)
        """Whether clips anywhere wait for percentiles."""
        self.iteration = 0
        """The next one."""

    def set_mode(self, iteration: int) -> Mode:
        mode = mode_at(self.feature, iteration, self.waiting)
        set_mode(self.quantizers.values(), mode)
        return mode

    @torch.no_grad()
    def check_order(self) -> None:
        """Raise where training has moved a lower clip above its upper one.

        Raises:
            ConfigError: names the linear and the remedy.
        """
        learned = {n: q for n, q in self.quantizers.items() if q.feature.learned}
        if not learned or self.waiting:
            return
        widths = torch.cat(
            [high - low for high, low in map(InputQuantizer.clips, learned.values())]
        )
        crossed = (~(widths > 0)).nonzero().flatten().tolist()
        if crossed:
            name = list(learned)[crossed[0]].partition(".")[2]
            raise ConfigError(
                f"{name}: its clips have crossed; train them more slowly with "
                f"{W4A4.spelled('clip_lr_mult')}"
            )

    def finish(self) -> None:
        """Set the clips that wait from what was observed.

        Raises:
            RuntimeError: the step has shown a quantizer nothing.
        """
        self.waiting = False
        experts = {n: q for n, q in self.quantizers.items() if _is_expert(q)}
        dense = {n: q for n, q in self.quantizers.items() if n not in experts}
        tensor = parallel_state.get_tensor_model_parallel_group()
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._set(dense, [tensor, data])
        if experts:
            self._set(experts, [parallel_state.get_expert_data_parallel_group()])

    def _set(self, quantizers: dict[str, InputQuantizer], groups: Sequence[Any]) -> None:
        if not quantizers:
            return
        device = torch.cuda.current_device()
        sizes = torch.tensor([_observed(q) for q in quantizers.values()], device=device)
        for group in groups:
            dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=group)
        # An expert that no token chose starts where the widest of its layer's others does.
        most = sizes.amax(0)
        sizes = torch.where(sizes == UNSEEN, most, sizes)
        if torch.isinf(sizes).any():
            raise RuntimeError(
                f"{W4A4.spelled('clip_init')} {self.feature.clip_init}: the first iteration has "
                "run none of the quantized linears"
            )
        for quantizer, (high, minus_low) in zip(quantizers.values(), sizes, strict=True):
            if quantizer.uncalibrated():
                for name, value in quantizer.calibrate(high, -minus_low).items():
                    _assign(getattr(quantizer, name), value)
            quantizer.observed = None


def _is_expert(quantizer: InputQuantizer) -> bool:
    return not all(getattr(clip, "allreduce", True) for clip in quantizer.parameters())


def _observed(quantizer: InputQuantizer) -> tuple[float, float]:
    """Upper percentile, and the lower one's negative."""
    if quantizer.observed is None:
        return UNSEEN, UNSEEN
    high, low = quantizer.observed
    return high.item(), -low.item()


@torch.no_grad()
def _assign(parameter: Any, value: Tensor) -> None:
    """Set a parameter and the fp32 copy that the optimizer has of it, be it this process that keeps
    it or another."""
    parameter.data.copy_(value)
    main = getattr(parameter, "main_param", None)
    if main is not None:
        main.data.copy_(value.view_as(main))


STATE: WeakKeyDictionary[nn.Module, Calibration] = WeakKeyDictionary()
"""Of models that train, by their first chunks."""


def prepare(model: Sequence[nn.Module], feature: W4A4, iteration: int) -> Calibration:
    """Find a model's quantizers and let them do what the iteration asks for."""
    found = STATE[model[0]] = Calibration(model, feature)
    found.iteration = iteration
    found.set_mode(iteration)
    return found


def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``train_step``: the mode of this iteration, and calibration behind it."""
    run = doors.megatron_args()
    feature = features_of(run).get(W4A4.key())
    if feature is None:
        return original(*args, **kwargs)
    model = inspect.signature(original).bind(*args, **kwargs).arguments["model"]
    found = STATE.get(model[0]) or prepare(model, feature, run.iteration)
    # Megatron's own loop tells; a script that calls the step by itself counts from its start.
    iteration = getattr(run, "curr_iteration", found.iteration)
    found.iteration = iteration + 1
    mode = found.set_mode(iteration)
    result = original(*args, **kwargs)
    if found.iteration % run.log_interval == 0:
        found.check_order()
    if mode is Mode.OBSERVE:
        found.finish()
    found.set_mode(found.iteration)
    return result
