"""Auxiliary losses in DeepSpeed engines, and their values in its monitor.

A model says which losses it has by holding :class:`torch_plugins.auxiliary_loss.AuxiliaryLoss`
modules. An engine with an optimizer takes those of its own model, so the engines of a process share
nothing. They are weighted as DeepSpeed weights the main loss, under any loss scale and number of
accumulation steps of the JSON; see :mod:`deepspeed_plugins.auxiliary_scale`. Scripts that call
``engine.backward(loss, scale_wrt_gas=False)`` have divided the main loss by these steps themselves;
the auxiliary ones are divided here. DeepSpeed does not know of micro-batches that a script
accumulates by hand, with steps of 1 in the JSON. It names their number::

    "deepspeed_plugins": {"aux_micro_batches": 4}

At each optimizer step the monitor is given ``Train/Samples/<name>``: the loss without its
coefficient, summed over layers, averaged over micro-batches and data-parallel processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_plugins.auxiliary_scale import EngineLosses, engines
from deepspeed_plugins.features import MICRO_BATCHES, SECTION, micro_batches
from deepspeed_plugins.seams import versions
from deepspeed_plugins.seams.requirements import require
from torch_plugins.auxiliary_loss import bind, describe, losses_of
from torch_plugins.config import ConfigError

KEY, TITLE = "auxiliary_loss", "auxiliary-losses"
UNSCALED_FP16 = (0, 19, 8)
"""Newest release of those that scale no loss in fp16 without ZeRO, and unscale the gradients."""


def check_accumulation(config: Any) -> None:
    """Refuse ``aux_micro_batches`` in a ``DeepSpeedConfig`` that accumulates already.

    Raises:
        ConfigError: names both keys.
    """
    by_hand, steps = micro_batches(config._param_dict), config.gradient_accumulation_steps
    if by_hand is not None and isinstance(steps, int) and steps > 1:  # "auto": not filled yet
        raise ConfigError(
            f"{SECTION}.{MICRO_BATCHES} {by_hand} with gradient_accumulation_steps {steps}: it is "
            "for scripts that accumulate by hand; drop it, or set gradient_accumulation_steps to 1"
        )


def check(engine_arguments: dict[str, Any]) -> None:
    """Refuse what the losses of a model do not go with, before its engine is built.

    Raises:
        ConfigError: names the key of the JSON and the remedy.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    config, model = engine_arguments["config_class"], engine_arguments["model"]
    if not (engine_arguments.get("optimizer") or config.optimizer_name):
        return
    by_hand, staged = micro_batches(config._param_dict), isinstance(model, PipelineModule)
    if not losses_of(model):
        if by_hand is not None and not staged:
            raise ConfigError(
                f"{SECTION}.{MICRO_BATCHES} {by_hand}: the model has no auxiliary loss; drop it"
            )
        return
    require(KEY, TITLE)
    version, fp16 = versions.installed() or UNSCALED_FP16, config.float16_config.enabled
    if fp16 and config.zero_optimization_stage == 0 and version <= UNSCALED_FP16:
        raise ConfigError(
            f"{TITLE} with fp16 and zero_optimization.stage 0: deepspeed {versions.text(version)} "
            "does not scale the loss, but divides the gradients by the loss scale; use stage 1, or "
            "bf16"
        )


def take(engine: Any) -> str | None:
    """Bind the losses of a new engine's model to it.

    Returns:
        A line that says which, or None without any on this pipeline stage.

    Raises:
        ConfigError: this DeepSpeed accumulates wrongly in pipelines.
    """
    if engine.optimizer_name() is None and engine.client_optimizer is None:
        return None
    names = {loss.name for loss in losses_of(engine.module)}
    if engine.pipeline_parallelism:
        names = _of_all_stages(engine, names)
    if not names:
        return None
    own = EngineLosses(sorted(names), micro_batches(engine._config._param_dict) or 1)
    engines[engine] = own
    found = bind(engine.module, own.scope)
    return f"{TITLE}: {describe(found)}" if found else None


def _of_all_stages(engine: Any, names: set[str]) -> set[str]:
    group = engine.module.mpu().get_pipe_parallel_group()
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, names, group=group)
    names = set().union(*everywhere)
    steps = engine.gradient_accumulation_steps()
    own_hook = "_backward_prologue_per_tensor" in vars(type(engine))
    if names and steps > 1 and len(everywhere) > 1 and not own_hook:
        raise ConfigError(
            f"{TITLE} with a pipeline and gradient_accumulation_steps {steps}: deepspeed "
            f"{versions.text(versions.installed())} divides the gradient by the steps at each "
            "stage; install 0.19.6 or later, or set gradient_accumulation_steps to 1"
        )
    return names


def values(engine: Any) -> dict[str, Tensor]:
    """By name, the losses of the engine's last optimizer step: without coefficient, summed over
    layers, averaged over micro-batches; of this process and pipeline stage."""
    return dict(engines[engine].last) if engine in engines else {}


def step(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``DeepSpeedEngine._take_model_step``, at each optimizer step, also of pipelines.

    Raises:
        RuntimeError: a loss is attached where no backward pass comes by.
    """
    own = engines.get(engine)
    if own is None:
        return original(engine, *args, **kwargs)
    own.scope.check()
    result = original(engine, *args, **kwargs)
    micro_batches = engine.gradient_accumulation_steps() * own.micro_batches
    own.last = {name: value / micro_batches for name, value in own.scope.take().items()}
    if engine.monitor.enabled:
        means = _mean(engine, own)
        if engine.global_rank == 0:
            found = zip(own.names, means.tolist(), strict=True)
            samples = engine.global_samples
            engine.monitor.write_events([(f"Train/Samples/{n}", v, samples) for n, v in found])
    return result


def _mean(engine: Any, own: EngineLosses) -> Tensor:
    """Last values over data-parallel processes and pipeline stages, in the order of ``names``."""
    zero = torch.zeros((), device=engine.device)
    means = torch.stack([own.last.get(name, zero).to(engine.device) for name in own.names])
    group = engine.seq_data_parallel_group
    dist.all_reduce(means, group=group)
    means /= dist.get_world_size(group)
    if engine.pipeline_parallelism:
        dist.all_reduce(means, group=engine.module.mpu().get_pipe_parallel_group())
    return means
