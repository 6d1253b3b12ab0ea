"""Plugin flags and checkpoints: weights of one function must not run as another in silence."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_plugins.arguments import features_of, set_features
from megatron_plugins.features import adapter
from megatron_plugins.refusals import hybrid_model
from torch_plugins.config import ConfigError


def restore(original: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Wrap of ``load_args_from_checkpoint`` (``--use-checkpoint-args``): features that the
    checkpoint has and the command line does not name are turned on, with the arguments of
    Megatron's own that belong to them."""
    result = original(args, *rest, **kwargs)
    if isinstance(result, tuple):  # else there was no checkpoint, or none with arguments
        given, saved = of_model(args), of_model(result[1])
        missing = {key: feature for key, feature in saved.items() if key not in given}
        set_features(args, missing)
        for feature in missing.values():
            vars(args).update(upstream_arguments(feature, result[1]))
            print_rank_0(f"Setting {as_flags(feature, result[1])} from checkpoint")
    return result


def compare(
    original: Callable[..., Any],
    load_dir: str | None,
    args: Namespace,
    rank0: bool = False,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Wrap of ``_load_base_checkpoint``, through which every load goes; ``rank0`` reads arguments
    only, before those of this run are known.

    A feature that changes the tensors makes the load itself fail: the reason is told in its place.
    Tensors that a feature can do without are set aside where the checkpoint lacks them.
    """
    aside: list[tuple[Any, Any]] = []
    translated = kwargs.get("gpt_compat_layer_maps") is not None  # 0.19 and newer
    if not rank0 and kwargs.get("sharded_state_dict"):

        def saved_arguments() -> Namespace:
            common = original(load_dir, args, True)[0] or {}
            return common.get("args") or Namespace()

        state = kwargs["sharded_state_dict"]
        for module in map(adapter, features_of(args)):
            if hasattr(module, "translate"):
                module.translate(state)
            if hasattr(module, "set_aside"):
                kept = module.set_aside(saved_arguments, state, str(load_dir))
                aside.append((module, kept))
    try:
        result = original(load_dir, args, rank0, *rest, **kwargs)
    except (Exception, CheckpointException):  # torch's is no Exception
        if not rank0:
            saved = original(load_dir, args, True)[0] or {}
            check(args, saved.get("args") or Namespace(), str(load_dir), translated)
        raise
    state_dict = result[0]
    if state_dict is not None and not rank0:
        check(args, state_dict.get("args") or Namespace(), str(load_dir), translated)
        for module, kept in aside:
            module.put_back(kept, state_dict)
    return result


def check(args: Namespace, saved_args: Namespace, folder: str, translated: bool = False) -> None:
    """Compare the features of this run with those of the checkpoint in ``folder``, which Megatron
    may have translated for a model of another kind.

    A standard checkpoint may become a plugin model, with a message; so may any with ``--finetune``.

    Raises:
        ConfigError: the checkpoint has a feature that this run lacks, or has with other values; or
            this run has one whose tensors the checkpoint lacks.
    """
    run, saved = of_model(args), of_model(saved_args)
    for key in run.keys() - saved.keys():
        if run[key].changes_tensors:
            raise ConfigError(
                f"checkpoint {folder} is a standard one, and {run[key].title} has other tensors. "
                f"{conversion(run[key], args, saved_args, folder)}"
            )
        print_rank_0(
            f"{run[key].name}: standard checkpoint loaded into a {run[key].title} model: "
            f"another function until retrained ({folder})"
        )
    for key, theirs in saved.items():
        mine = run.get(key)
        if mine is None and in_stock(theirs, saved_args, args):
            print_rank_0(f"{theirs.name}: checkpoint {folder} loaded into stock layers")
            continue
        models = ["hybrid" if hybrid_model(a) else "GPT" for a in (saved_args, args)]
        if theirs.changes_tensors and models[0] != models[1] and not translated:
            raise ConfigError(
                f"checkpoint {folder} is of a {models[0]} model and has {theirs.title}, this run "
                f"builds a {models[1]} model: only 0.19 and newer translate, and only a GPT's "
                f"for a hybrid model. Build a {models[0]} model, or load another checkpoint"
            )
        layers = args.num_layers
        if mine is None or function(mine, args, layers) != function(theirs, saved_args, layers):
            wanted = as_flags(theirs, saved_args)
            told = f"has {wanted}, this run {as_flags(mine, args) if mine else 'does not'}"
            if theirs.changes_tensors:
                raise ConfigError(
                    f"checkpoint {folder} {told}: it has other tensors. Give {wanted}, or "
                    "--use-checkpoint-args"
                )
            if not args.finetune:
                raise ConfigError(
                    f"checkpoint {folder} {told}: its weights would compute another function. Give "
                    f"{wanted}, or --use-checkpoint-args, or --finetune to retrain them"
                )
            print_rank_0(f"{theirs.name}: checkpoint {folder} {told}: retrain it")


def conversion(feature: Any, args: Namespace, saved_args: Namespace, folder: str) -> str:
    """How a standard checkpoint becomes one with a feature."""
    if not getattr(adapter(feature.key()), "CONVERTS", False) or hybrid_model(saved_args):
        return "Train from the start, or load a checkpoint that has them"
    flags = as_flags(feature, args)
    return f"Convert it: python -m megatron_plugins.convert --load {folder} --save NEW {flags}"


def in_stock(feature: Any, saved: Namespace, args: Namespace) -> bool:
    """Whether layers of Megatron's own that ``args`` ask for are a feature's: its adapter's
    ``in_stock(feature, saved, args)`` says so, or raises because they nearly are."""
    asked = getattr(adapter(feature.key()), "in_stock", None)
    return bool(asked and asked(feature, saved, args))


def of_model(args: Namespace) -> dict[str, Any]:
    """Active features that decide the function of the weights; a schedule is not one of them."""
    return {key: feature for key, feature in features_of(args).items() if feature.changes_model}


def function(feature: Any, args: Namespace, num_layers: int) -> Any:
    """What decides the function of the weights: of the feature's values, or of all arguments where
    its adapter has ``function(args, feature)``."""
    of_arguments = getattr(adapter(feature.key()), "function", None)
    return of_arguments(args, feature) if of_arguments else feature.function(num_layers)


def upstream_arguments(feature: Any, args: Namespace) -> dict[str, Any]:
    """Megatron's own arguments that belong to a feature: ``ARGUMENTS`` of its adapter."""
    names = getattr(adapter(feature.key()), "ARGUMENTS", ())
    return {name: getattr(args, name) for name in names}


def as_flags(feature: Any, args: Namespace) -> str:
    """``--ladder-residual --ladder-layers all``."""
    given = {feature.flag(name): value for name, value in feature.to_dict().items()}
    for name, value in upstream_arguments(feature, args).items():
        given["--" + name.replace("_", "-")] = value
    given = {flag: value for flag, value in given.items() if value not in (None, False)}
    words = [
        flag if value is True else f"{flag} {shlex.quote(str(value))}"
        for flag, value in given.items()
    ]
    return " ".join([feature.flag(), *words])


def print_rank_0(message: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(message, flush=True)
