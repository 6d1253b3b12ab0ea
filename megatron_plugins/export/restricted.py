"""The pickles of a checkpoint, read through allow-lists: a name outside them is an error, and
nothing of the file is ever called.

A ``torch_dist`` checkpoint holds two: ``.metadata``, which torch itself would unpickle freely, and
the common state (arguments, iteration), a file ``common.pt`` up to megatron-core 0.18 and an item
of the tensor files from 0.19 on.
"""

from __future__ import annotations

import pickle
import signal
from argparse import Namespace
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from torch_plugins.config import ConfigError

METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # Python 3.13
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
                "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
            ),
            (planner, "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType"),
            (filesystem, "_StorageInfo _StoragePrefix"),
        )
        for name in names.split()
        if hasattr(module, name)
    },
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}
"""What ``.metadata`` may name: records of torch.distributed.checkpoint, and what they hold."""


class Inert:
    """Stands for a class of Megatron: keeps what it was made of, does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.values}"


MEGATRON_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
)
"""Classes that Megatron 0.17 to 0.20 puts into the common state; each becomes an :class:`Inert`."""


def _stand_in(path: str) -> type[Inert]:
    module, _, name = path.rpartition(".")
    return type(name, (Inert,), {"__module__": module, "__qualname__": name})


COMMON_GLOBALS: list[Any] = [
    Namespace,
    SimpleNamespace,
    PosixPath,
    signal.Signals,
    *(_stand_in(path) for path in MEGATRON_CLASSES),
]
"""What the common state may name, beside what ``torch.load(weights_only=True)`` allows itself."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return METADATA_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_metadata(path: Path) -> metadata.Metadata:
    """The ``.metadata`` of a checkpoint.

    Raises:
        ConfigError: it names anything but records of torch.distributed.checkpoint, or is damaged.
    """
    try:
        with path.open("rb") as file:
            result = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ConfigError(
            f"{path}: refused, a checkpoint's metadata holds only records of "
            f"torch.distributed.checkpoint ({error}); do not load this checkpoint elsewhere"
        ) from error
    if not isinstance(result, metadata.Metadata):
        raise ConfigError(f"{path}: refused, it holds a {type(result).__name__}, not metadata")
    return result


def read_common(file: str | Path | IO[bytes], source: str) -> dict[str, Any]:
    """The common state: ``args``, ``iteration`` and the like.

    Args:
        file: what ``torch.save`` wrote.
        source: what errors call it.

    Raises:
        ConfigError: it names a class outside the allow-list, or holds no state.
    """
    try:
        with torch.serialization.safe_globals(COMMON_GLOBALS):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line), str(error)
        ).strip()
        raise ConfigError(
            f"{source}: refused, it holds more than arguments and numbers: {reason}"
        ) from error
    state = state[0] if isinstance(state, list) and len(state) == 1 else state
    if not isinstance(state, dict) or not isinstance(state.get("args"), Namespace):
        raise ConfigError(
            f"{source}: no arguments in it; export a checkpoint that Megatron's training loop saved"
        )
    return state
