"""Say which plugins are active once the model is built; a flag that changed nothing is an error."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist

from megatron_plugins.arguments import features_of
from megatron_plugins.features import adapter
from megatron_plugins.seams import doors
from torch_plugins.config import ConfigError


def report(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap of ``setup_model_and_optimizer``: rank 0 prints one line per active feature.

    Raises:
        ConfigError: a feature is on and a layer that should use it, in no process, does.
    """
    from megatron_plugins import layers

    result = original(*args, **kwargs)
    run = doors.megatron_args()
    features = features_of(run)
    if features:
        lines = summary(features, run.num_layers, gather(layers.ACTIVE), run, result)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print("\n".join(lines), flush=True)
    return result


def gather(active: Mapping[str, set[int]]) -> dict[str, set[int]]:
    """Union over all processes of the layers that a feature rewrote."""
    everywhere: list[Any] = [dict(active)]
    if dist.is_initialized():
        everywhere *= dist.get_world_size()
        dist.all_gather_object(everywhere, dict(active))
    union: dict[str, set[int]] = {}
    for one in everywhere:
        for key, indices in one.items():
            union.setdefault(key, set()).update(indices)
    return union


def summary(
    features: Mapping[str, Any],
    num_layers: int,
    active: Mapping[str, set[int]],
    run: Namespace | None = None,
    built: Any = None,
) -> list[str]:
    """``["ladder-residual: 4 of 4 layers"]``; see :func:`report` for what is raised.

    A feature that does not rewrite layers has ``describe(feature, args, built)`` in its adapter,
    ``built`` being ``(model chunks, optimizer, scheduler)``.
    """
    lines = []
    for key, feature in features.items():
        describe = getattr(adapter(key), "describe", None)
        if describe is not None:
            lines.append(f"{feature.name}: {describe(feature, run, built)}")
            continue
        counted = count(feature, feature.resolve(num_layers), num_layers, active)
        lines.append(f"{feature.name}: {counted}")
    return lines


def count(
    feature: Any, wanted: Iterable[int], num_layers: int, active: Mapping[str, set[int]]
) -> str:
    """``"4 of 4 layers"``, once every wanted layer is found active.

    Raises:
        ConfigError: one is not.
    """
    wanted = set(wanted)
    missing = sorted(wanted - active.get(feature.key(), set()))
    if missing:
        raise ConfigError(
            f"{feature.flag()} is on, but layers {missing} of this model do not use it: only "
            "GPTModel with a TransformerBlock does, and where the feature is for hybrid models, "
            "HybridModel. Drop the flag, or run "
            "python -m megatron_plugins.doctor"
        )
    return f"{len(wanted)} of {num_layers} layers"
