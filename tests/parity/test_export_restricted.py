"""A checkpoint that carries code is refused, and the code never runs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_plugins.export.checkpoint import COMMON_FILE, COMMON_ITEM, Checkpoint, find_iteration
from tests.parity.conftest import Evil, plain_arguments
from torch_plugins.config import ConfigError


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def read_metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_metadata(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_free_unpickling_would_execute(marker: Path) -> None:
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


@pytest.mark.parametrize("where", ["alone", "args", "state"])
def test_common_file(where: str, checkpoint: Path, marker: Path) -> None:
    folder = find_iteration(checkpoint)
    args = plain_arguments(folder)
    evil = Evil(marker)
    state = {"alone": evil, "args": {"args": evil}, "state": {"args": args, "more": [evil]}}[where]
    torch.save(state, folder / COMMON_FILE)
    with pytest.raises(ConfigError, match=r"common\.pt: refused"):
        Checkpoint(folder)
    assert not marker.exists()


def test_common_item(checkpoint: Path, marker: Path) -> None:
    """From 0.19 on the common state lies among the tensors."""
    folder = find_iteration(checkpoint)
    (folder / COMMON_FILE).unlink(missing_ok=True)
    torch.save([{"args": Evil(marker)}], folder / "evil.distcp")
    metadata = read_metadata(folder)
    length = (folder / "evil.distcp").stat().st_size
    metadata.state_dict_metadata[COMMON_ITEM] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(COMMON_ITEM)] = _StorageInfo("evil.distcp", 0, length)
    write_metadata(folder, metadata)
    with pytest.raises(ConfigError, match=r"common state of .*: refused"):
        Checkpoint(folder)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_metadata(where: str, checkpoint: Path, marker: Path) -> None:
    folder = find_iteration(checkpoint)
    metadata = read_metadata(folder)
    metadata.planner_data = Evil(marker)
    write_metadata(folder, Evil(marker) if where == "alone" else metadata)
    with pytest.raises(ConfigError, match=r"\.metadata: refused.*pathlib"):
        Checkpoint(folder)
    assert not marker.exists()


def test_metadata_of_another_kind(checkpoint: Path) -> None:
    folder = find_iteration(checkpoint)
    write_metadata(folder, torch.Size((1,)))
    with pytest.raises(ConfigError, match="holds a Size"):
        Checkpoint(folder)


def test_files_outside(checkpoint: Path) -> None:
    folder = find_iteration(checkpoint)
    metadata = read_metadata(folder)
    key = next(key for key in metadata.storage_data if key.fqn.startswith("embedding"))
    metadata.storage_data[key].relative_path = "../secret"
    write_metadata(folder, metadata)
    with pytest.raises(ConfigError, match="outside"):
        Checkpoint(folder)


def test_missing_shard(checkpoint: Path) -> None:
    """A tensor whose shards do not cover it is an error, never memory that was not written."""
    folder = find_iteration(checkpoint)
    metadata = read_metadata(folder)
    metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks.pop()
    write_metadata(folder, metadata)
    with pytest.raises(ConfigError, match=r"embedding\.word_embeddings\.weight are not the whole"):
        Checkpoint(folder).read("embedding.word_embeddings.weight")


def test_unknown_class(checkpoint: Path) -> None:
    """Not evil, only unknown: the message names it."""
    folder = find_iteration(checkpoint)
    torch.save({"args": plain_arguments(folder), "fork": find_iteration}, folder / COMMON_FILE)
    with pytest.raises(ConfigError, match=r"megatron_plugins\.export\.checkpoint\.find_iteration"):
        Checkpoint(folder)
