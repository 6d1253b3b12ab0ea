"""A ``torch_dist`` checkpoint: where it lies, its arguments, its tensors one slice at a time.

torch.distributed.checkpoint alone: no Megatron, no process group, no GPU. A tensor comes whole
whatever tensor, pipeline or data parallelism wrote it.
"""

from __future__ import annotations

import io
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from torch_plugins.config import ConfigError

from .restricted import read_common, read_metadata

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_FILE = "common.pt"
COMMON_ITEM = "common_state/shard_0_1"


def find_iteration(load: Path, iteration: int | None = None) -> Path:
    """The folder with one iteration's checkpoint.

    Args:
        load: what was given to Megatron's ``--save``, or one ``iter_`` folder in it.
        iteration: which one; default: the latest.

    Raises:
        ConfigError: there is none, or it is not in the ``torch_dist`` format.
    """
    if not load.is_dir():
        raise ConfigError(f"--load {load}: no such folder")
    folder = load
    if not _is_iteration(load):
        folder = load / (f"iter_{iteration:07d}" if iteration is not None else _latest(load))
    elif iteration is not None and load.name != f"iter_{iteration:07d}":
        raise ConfigError(f"--load {load} is one iteration already: drop --iteration {iteration}")
    if not folder.is_dir():
        there = sorted(path.name for path in load.glob("iter_*"))
        raise ConfigError(f"{folder}: no such checkpoint; {load} has {', '.join(there) or 'none'}")
    _check_format(folder)
    return folder


def _is_iteration(folder: Path) -> bool:
    return (
        folder.name.startswith("iter_")
        or (folder / ".metadata").exists()
        or any(folder.glob("mp_rank_*"))
    )


def _latest(load: Path) -> str:
    tracker = load / TRACKER
    if not tracker.is_file():
        raise ConfigError(
            f"--load {load}: no {TRACKER} in it; give the folder of Megatron's --save, or an iter_ "
            "folder in it"
        )
    text = tracker.read_text().strip()
    return text if text == "release" else f"iter_{int(text):07d}"


def _check_format(folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise ConfigError(
            f"{folder}: the legacy 'torch' format (mp_rank folders); convert it first: run your "
            "launcher with --load, --ckpt-convert-format torch_dist and --ckpt-convert-save"
        )
    config = folder / "metadata.json"
    backend = json.loads(config.read_text()).get("sharded_backend") if config.is_file() else None
    if backend != "torch_dist":
        found = "no metadata.json" if backend is None else f"format {backend!r}"
        raise ConfigError(
            f"{folder}: {found}; only --ckpt-format torch_dist is read, and a save that was "
            "interrupted has no metadata.json either"
        )
    if not (folder / ".metadata").is_file():
        raise ConfigError(f"{folder}: no .metadata: the save did not finish; use another iteration")


class Checkpoint:
    """One iteration, opened for reading.

    Attributes:
        args: the arguments of the run that saved it.
        tensors: key -> shape of every tensor, optimizer state included.
        states: keys of everything else, which is pickled and here never unpickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder / ".metadata")
        self._check_paths()
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, True)
        items = self._metadata.state_dict_metadata
        self._items = {k: v for k, v in items.items() if isinstance(v, TensorStorageMetadata)}
        self.tensors = {key: item.size for key, item in self._items.items()}
        self.states = [key for key in items if key not in self._items]
        state = self._common_state()
        self.args: Namespace = state["args"]
        self.iteration: Any = state.get("iteration")

    def _check_paths(self) -> None:
        """A checkpoint names files in its own folder only."""
        for info in self._metadata.storage_data.values():
            name = str(info.relative_path)
            if Path(name).name != name:
                raise ConfigError(f"{self.folder}: refused, it refers to the file {name!r} outside")

    def _common_state(self) -> dict[str, Any]:
        file = self.folder / COMMON_FILE
        if file.is_file():
            return read_common(file, str(file))
        if COMMON_ITEM not in self.states:
            raise ConfigError(f"{self.folder}: neither {COMMON_FILE} nor a common state in it")
        return read_common(self.read_bytes(COMMON_ITEM), f"common state of {self.folder}")

    def read_bytes(self, key: str) -> io.BytesIO:
        """One of ``states``, as it is."""
        index = MetadataIndex(key)
        one, zero = torch.Size((1,)), torch.Size((0,))
        item = ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, one)
        planner = _RawPlanner(torch.empty(0))
        self._reader.read_data(LoadPlan([item]), planner)
        return planner.bytes

    def dtype(self, key: str) -> torch.dtype:
        return self._items[key].properties.dtype

    def read(self, key: str, row: int | None = None) -> Tensor:
        """A whole tensor, or ``tensor[row]``, of which only that row is read.

        Raises:
            ConfigError: the chunks in the files do not make up the tensor exactly.
        """
        item = self._items[key]
        size = item.size if row is None else torch.Size((1, *item.size[1:]))
        offsets = torch.Size([row or 0] + [0] * (len(size) - 1)) if size else size
        target = torch.empty(size, dtype=item.properties.dtype)
        wanted = [ChunkStorageMetadata(offsets, size)]
        reads = create_read_items_for_chunk_list(key, item, wanted)
        if sum(math.prod(read.lengths) for read in reads) != target.numel():
            raise ConfigError(f"{self.folder}: the shards of {key} are not the whole tensor")
        self._reader.read_data(LoadPlan(reads), _RawPlanner(target))
        return target if row is None else target[0]


class _RawPlanner(LoadPlanner):
    """Puts chunks into one tensor, and keeps bytes as they are: torch's own would unpickle them."""

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.bytes = io.BytesIO()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor is a view of the target."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.bytes = value

    def set_up_planner(
        self,
        state_dict: Any,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        raise NotImplementedError("reads are planned by Checkpoint")

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("reads are planned by Checkpoint")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError("reads are planned by Checkpoint")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError("reads are planned by Checkpoint")
