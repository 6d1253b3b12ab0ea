"""Power LR from DeepSpeed's JSON (arXiv 2408.13359)::

    "scheduler": {
      "type": "PowerLR",
      "params": {"sequence_length": 4096, "warmup_max_lr": 0.02, "warmup_tokens": 1e9}
    }

Parameters are the fields of :class:`torch_plugins.power_lr_settings.Settings`. ``warmup_min_lr``,
``warmup_max_lr``, ``warmup_num_steps`` and ``total_num_steps`` have the names that Hugging Face's
``"auto"`` fills. The batch size is the engine's ``train_batch_size``, in sequences, and follows
``engine.set_train_batch_size``: so give phases of a run that ramps up in tokens.

``warmup_max_lr`` is the rate of the group with the largest ``lr``; other groups keep their
proportion to it. The first optimizer step runs at the rate of 0 tokens, the second at that of one
batch, as with torch's schedulers. DeepSpeed's own set the first rate twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch.optim import Optimizer

from torch_plugins import power_lr
from torch_plugins.config import ConfigError
from torch_plugins.power_lr_settings import Settings, describe_scheduler, scale_peaks

TYPE = "PowerLR"
WHERE = "scheduler.params"
FILLED_BY_TRAINER = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")


class PowerLR(power_lr.PowerLR):
    """The scheduler of an engine; see the module.

    Args:
        optimizer: torch's, or DeepSpeed's wrapper of one.
        batch_size: sequences of the engine's global batch.
        params: ``scheduler.params``.

    Raises:
        ConfigError: a wrong parameter, or no batch size.
    """

    def __init__(self, optimizer: Any, batch_size: int | None = None, **params: Any) -> None:
        if batch_size is None:
            raise ConfigError(f"{TYPE} of the JSON needs the batch size of a DeepSpeedEngine")
        settings = Settings.read(params, WHERE)
        optimizer = unwrapped(optimizer)
        scale_peaks(optimizer, settings.warmup_max_lr)
        super().__init__(optimizer, **settings.arguments(batch_size))

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Count the engine's batch, and set the rates of the next step.

        Raises:
            ConfigError: any argument. The engine takes a ``TypeError`` for a scheduler that wants
                the batch size, and would call again with that as the epoch.
        """
        if args or kwargs:
            raise ConfigError(
                f"{TYPE}.step takes no argument, as the engine's batch size counts: got {args} "
                f"{kwargs}; drop lr_kwargs"
            )
        super().step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position, with the settings of the JSON and the engine's batch size of
        now: the script that had changed it does so again."""
        batch_size = self.batch_size
        super().load_state_dict(state_dict)
        self.set_batch_size(batch_size)


def unwrapped(optimizer: Any) -> Optimizer:
    """torch's optimizer, under DeepSpeed's wrappers of it."""
    while not isinstance(optimizer, Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ConfigError(f"{TYPE}: no torch optimizer under {type(optimizer).__name__}")
        optimizer = inner
    return optimizer


def register(lr_schedules: ModuleType) -> None:
    """Make the class one of DeepSpeed's schedulers; called once their module is imported."""
    setattr(lr_schedules, TYPE, PowerLR)
    if TYPE not in lr_schedules.VALID_LR_SCHEDULES:
        lr_schedules.VALID_LR_SCHEDULES.append(TYPE)


def from_engine(original: Callable[..., Any], engine: Any, optimizer: Any) -> Any:
    """Wrap of ``DeepSpeedEngine._scheduler_from_config``: adds the batch size."""
    if engine.scheduler_name() != TYPE:
        return original(engine, optimizer)
    return PowerLR(optimizer, batch_size=engine.train_batch_size(), **engine.scheduler_params())


def follow_batch(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap of the engine's ``set_train_batch_size`` and ``set_train_micro_batch_size``: the rates
    of the next step follow, also those of a client's own PowerLR."""
    original(engine, *args, **kwargs)
    if isinstance(engine.lr_scheduler, power_lr.PowerLR):
        engine.lr_scheduler.set_batch_size(engine.train_batch_size())


def from_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``scheduler.params`` of a JSON whose scheduler is PowerLR, checked.

    ``"auto"`` of Hugging Face's names may still be there: zero.Init reads the JSON before Trainer
    knows the length of the run.
    """
    scheduler = config.get("scheduler") or {}
    if scheduler.get("type") != TYPE:
        return None
    params = scheduler.get("params") or {}
    waiting = {name for name in FILLED_BY_TRAINER if params.get(name) == "auto"}
    Settings.read({k: v for k, v in params.items() if k not in waiting}, WHERE)
    return dict(params)


def validate(params: Mapping[str, Any], engine_arguments: Mapping[str, Any]) -> None:
    """Raise what building the scheduler would raise once the engine has its memory.

    Raises:
        ConfigError: ``"auto"`` that nothing filled, phases that overlap, a second scheduler.
    """
    settings = Settings.read(params, WHERE)
    settings.check(engine_arguments["config_class"].train_batch_size)
    client = engine_arguments.get("lr_scheduler")
    if client is not None:
        name = getattr(client, "__name__", type(client).__name__)
        raise ConfigError(
            f'"scheduler" is {TYPE}, but the script passes {name} to '
            "deepspeed.initialize, which DeepSpeed would use in its place: drop one of them"
        )


def describe(params: Mapping[str, Any], engine: Any) -> str:
    """The schedule that the engine really follows.

    Raises:
        ConfigError: it follows another one.
    """
    if engine.optimizer_name() is None and engine.client_optimizer is None:
        return "no optimizer, so no rates"
    if not isinstance(engine.lr_scheduler, PowerLR):
        raise ConfigError(
            f'"scheduler" is {TYPE}, but the engine has {type(engine.lr_scheduler).__name__}; run '
            "python -m deepspeed_plugins.doctor"
        )
    return describe_scheduler(engine.lr_scheduler)
