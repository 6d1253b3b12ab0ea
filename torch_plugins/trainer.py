"""Power LR in Hugging Face's Trainer (arXiv 2408.13359), without a change to the script::

    TrainingArguments(
        learning_rate=0.02,
        warmup_steps=100,
        lr_scheduler_type="power",
        lr_scheduler_kwargs={"sequence_length": 4096, "decay_num_steps": 1000},
    )

``learning_rate`` is the peak, ``warmup_steps`` the warm-up, and the end of the run that of the last
phase; ``lr_scheduler_kwargs`` takes the other fields of
:class:`torch_plugins.power_lr_settings.Settings`. The global batch size is Trainer's; a
``batch_size`` in the kwargs, in sequences, goes before it. Every optimizer step counts as a full
batch, the short one at the end of an epoch too.

The installed entry point arms this, or ``import torch_plugins.hf``. Without either, Trainer's own
way works: override ``create_scheduler`` and set ``self.lr_scheduler = PowerLR(...)``.

With accelerate alone, ``accelerator.prepare(PowerLR(optimizer, batch_size=...))`` steps once per
optimizer step here, the batch size being the global one. Where nothing is armed, accelerate would
step ``num_processes`` times: leave the scheduler out of ``prepare``, and step it when
``accelerator.sync_gradients``.

transformers is not imported here: what is hooked comes as an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import Enum
from types import ModuleType
from typing import Any

from torch_plugins.config import ConfigError

TYPE = "power"
WHERE = "lr_scheduler_kwargs"
OF_TRAINER = {
    "warmup_max_lr": "learning_rate",
    "warmup_num_steps": "warmup_steps",
    "total_num_steps": "max_steps or num_train_epochs",
}
"""Settings that TrainingArguments have, by name."""


def add_scheduler_type(trainer_utils: ModuleType) -> None:
    """``SchedulerType("power")``; called once ``transformers.trainer_utils`` is imported."""
    add_member(trainer_utils.SchedulerType, "POWER", TYPE)


def add_scheduler_function(optimization: ModuleType) -> None:
    """``get_scheduler("power")``; called once ``transformers.optimization`` is imported."""
    functions = optimization.TYPE_TO_SCHEDULER_FUNCTION
    functions[optimization.SchedulerType(TYPE)] = power_schedule


def add_member(enumeration: type[Enum], name: str, value: str) -> None:
    """Add a member to an enumeration of strings at run time.

    Enumerations are closed on purpose, and their registry is no public interface; but Trainer takes
    a scheduler by no other name. It writes what ``EnumType`` does for a member of a class body:
    lookup by value and by name, iteration, and the class attribute.
    """
    if value in enumeration._value2member_map_:
        return
    member: Any = str.__new__(enumeration, value)  # type: ignore[type-var]
    member._name_, member._value_ = name, value
    member._sort_order_ = len(enumeration._member_names_)
    member.__objclass__ = enumeration
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    type.__setattr__(enumeration, name, member)


def power_schedule(
    optimizer: Any, num_warmup_steps: int = 0, num_training_steps: int | None = None, **given: Any
) -> Any:
    """What ``get_scheduler("power", ...)`` builds; ``given`` are ``lr_scheduler_kwargs``.

    Raises:
        ConfigError: no batch size, or wrong settings.
    """
    from torch_plugins.power_lr import PowerLR

    settings, batch_size = _settings(given, num_warmup_steps, num_training_steps)
    if batch_size is None:
        raise ConfigError(
            f"{WHERE}.batch_size is missing: outside Trainer.create_scheduler, give the sequences "
            "of the global batch"
        )
    return PowerLR(optimizer, **settings.arguments(batch_size))


def _settings(
    given: Mapping[str, Any], warmup_steps: float | None, total_steps: int | None
) -> tuple[Any, int | None]:
    """Settings and batch size from ``lr_scheduler_kwargs`` and what Trainer gives."""
    from torch_plugins.power_lr_settings import Settings

    for name in given:
        if name in OF_TRAINER:
            raise ConfigError(f"{WHERE}.{name}: set {OF_TRAINER[name]} of TrainingArguments")
    settings = {name: value for name, value in given.items() if name != "batch_size"}
    if warmup_steps:
        settings["warmup_num_steps"] = warmup_steps
    if total_steps and "total_tokens" not in settings:
        settings["total_num_steps"] = total_steps
    return Settings.read(settings, WHERE), given.get("batch_size")


def check_arguments(original: Callable[..., Any], arguments: Any) -> None:
    """Wrap of ``TrainingArguments.__post_init__``: refuses wrong settings before a model is built.

    Raises:
        ConfigError: see :func:`power_schedule`; or a scheduler in the DeepSpeed JSON, which counts.
    """
    original(arguments)
    if arguments.lr_scheduler_type != TYPE:
        return
    if "scheduler" in getattr(getattr(arguments, "hf_deepspeed_config", None), "config", {}):
        raise ConfigError(
            f'lr_scheduler_type "{TYPE}" is not read where the DeepSpeed JSON has a "scheduler": '
            'make its type "PowerLR", or drop it'
        )
    _settings(arguments.lr_scheduler_kwargs or {}, arguments.warmup_steps, None)


def create_scheduler(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``Trainer.create_scheduler``: adds the global batch size to ``lr_scheduler_kwargs``
    for the call, and says what became active."""
    arguments = trainer.args
    if arguments.lr_scheduler_type != TYPE or trainer.lr_scheduler is not None:
        return original(trainer, *args, **kwargs)
    from torch_plugins.power_lr import PowerLR
    from torch_plugins.power_lr_settings import describe_scheduler

    given = arguments.lr_scheduler_kwargs
    arguments.lr_scheduler_kwargs = {"batch_size": global_batch_size(trainer), **(given or {})}
    try:
        scheduler = original(trainer, *args, **kwargs)
    finally:
        arguments.lr_scheduler_kwargs = given
    if isinstance(scheduler, PowerLR) and trainer.is_world_process_zero():
        print(f"power-lr: {describe_scheduler(scheduler)}", flush=True)
    return scheduler


def global_batch_size(trainer: Any) -> int:
    """Sequences of an optimizer step over all processes."""
    if trainer.accelerator.split_batches:  # the loader's batch is that of all processes together
        return trainer._train_batch_size * trainer.args.gradient_accumulation_steps
    return trainer.get_total_train_batch_size(trainer.args)


def step_once(
    original: Callable[..., Any], prepared: Any, scheduler: Any, *args: Any, **kwargs: Any
) -> None:
    """Wrap of accelerate's ``AcceleratedScheduler.__init__``: a PowerLR steps once per optimizer
    step, as its batch size is the global one."""
    original(prepared, scheduler, *args, **kwargs)
    module = sys.modules.get("torch_plugins.power_lr")
    if module is not None and isinstance(scheduler, module.PowerLR):
        prepared.split_batches = True
