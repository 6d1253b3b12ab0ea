"""Write a ``torch_dist`` checkpoint that Megatron loads, one tensor at a time.

torch.distributed.checkpoint alone: no Megatron, no process group, no GPU. It is a *release* in
Megatron's sense: weights and arguments without iteration and optimizer, so training starts at
iteration 0 without ``--finetune`` or ``--no-load-optim``.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from torch_plugins.config import ConfigError

from .checkpoint import COMMON_FILE, TRACKER

RELEASE = "release"


@dataclass(frozen=True)
class Source:
    """A tensor to come: its shape and dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Stack:
    """One tensor ``[L, ...]`` of the layers' tensors, each read and written by itself."""

    layers: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype


def check_place(save: Path, flag: str = "--save") -> None:
    """Raise :class:`ConfigError` for a place that must not be written to; ``flag`` named it."""
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise ConfigError(f"{flag} {save} is there already: name a new or an empty folder")


def check_new(to: Path) -> None:
    """Raise :class:`ConfigError` for a ``--to`` that cannot be made."""
    check_place(to, "--to")
    if not to.absolute().parent.is_dir():
        raise ConfigError(f"--to {to}: {to.absolute().parent} is not a folder; create it first")


def save_release(
    save: Path,
    tensors: Mapping[str, Source | Stack],
    states: Mapping[str, Callable[[], io.BytesIO]],
    args: Namespace,
) -> Path:
    """Write ``save/release``, then the tracker that makes it count; nothing stays of a failure.

    Args:
        tensors: by key; those in stacks are written layer by layer, after all others.
        states: pickled objects by key, written as they are.
        args: those of the run; what only Megatron can unpickle is left out.
    """
    check_place(save)
    folder = save / RELEASE
    folder.mkdir(parents=True)
    try:
        placeholders: dict[str, Any] = {
            key: torch.empty(source.shape, dtype=source.dtype, device="meta")
            for key, source in tensors.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save(
                placeholders | dict.fromkeys(states),
                storage_writer=dcp.FileSystemWriter(folder),
                planner=_ReadingPlanner(tensors, states),
                no_dist=True,
            )
        plain = {key: value for key, value in vars(args).items() if _is_plain(value)}
        common = {"args": Namespace(**plain), "iteration": 0, "checkpoint_version": 3.0}
        torch.save(common, folder / COMMON_FILE)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backend))
        (save / TRACKER).write_text(RELEASE)
    except dcp.api.CheckpointException as error:  # torch wraps whatever a read raises
        shutil.rmtree(folder)
        raise next(iter(error.failures.values()))[0] from error
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool, torch.dtype)


class _ReadingPlanner(DefaultSavePlanner):
    """Reads what is to be written only when it is written."""

    def __init__(
        self,
        tensors: Mapping[str, Source | Stack],
        states: Mapping[str, Callable[[], io.BytesIO]],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors, self.states = tensors, states

    def create_local_plan(self) -> SavePlan:
        """torch's, with one item for each layer of a stack in place of one for the whole."""
        plan = super().create_local_plan()
        items, stacks = [], []
        for item in plan.items:
            source = self.tensors.get(item.index.fqn)
            if isinstance(source, Stack):
                stacks.append([_layer_item(item, layer) for layer in range(len(source.layers))])
            else:
                items.append(item)
        by_layer = zip(*stacks, strict=True)
        items += [item for layer in by_layer for item in layer]
        self.plan = replace(plan, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        key = write_item.index.fqn
        if key in self.states:
            return self.states[key]()
        source = self.tensors[key]
        if isinstance(source, Stack):
            assert write_item.index.offset is not None
            return _read(key, source.layers[write_item.index.offset[0]])[None]
        return _read(key, source)


def _layer_item(item: WriteItem, layer: int) -> WriteItem:
    """The part of a stack that is one layer."""
    assert item.tensor_data is not None
    size = item.tensor_data.size
    offsets = torch.Size((layer, *[0] * (len(size) - 1)))
    chunk = ChunkStorageMetadata(offsets, torch.Size((1, *size[1:])))
    index = MetadataIndex(item.index.fqn, offsets)
    data = replace(item.tensor_data, chunk=chunk)
    return replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)


def _read(key: str, source: Source) -> Tensor:
    tensor = source.read()
    if tuple(tensor.shape) != tuple(source.shape):
        raise RuntimeError(f"{key} is {list(tensor.shape)}, not {list(source.shape)}")
    return tensor.to(source.dtype).contiguous()
