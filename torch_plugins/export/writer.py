"""A Hugging Face folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..config import ConfigError
from .experts import ExpertTensors
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..hf import PluginDecoderConfig

INDEX = "model.safetensors.index.json"

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Class of a stock model by its ``model_type``."""


class Weights(Protocol):
    """Tensors by their Hugging Face name, made one at a time."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def meta(self, name: str) -> torch.Tensor:
        """The tensor without memory."""
        ...


def check_output(output: Path, force: bool) -> None:
    """Refuse a place that must not be written to, before any work.

    Raises:
        ConfigError: it is there without ``--force``, or is no model folder.
    """
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder; create it first")
    if not os.path.lexists(output):
        return
    if not force:
        raise ConfigError(
            f"--output {output} is there already: name another, or --force replaces it"
        )
    if output.is_symlink() or not output.is_dir():
        raise ConfigError(f"--output {output}: not a folder; --force replaces model folders only")
    if any(output.iterdir()) and not (output / "config.json").is_file():
        raise ConfigError(
            f"--output {output} holds other things than a model (no config.json); --force replaces "
            "model folders only"
        )


def check_shard_size(size: str) -> None:
    """Raise :class:`ConfigError` for a ``--max-shard-size`` that cannot be read."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        raise ConfigError(
            f"--max-shard-size {size}: a number and KB, MB, GB or TB, such as 5GB"
        ) from error


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside ``output`` that takes its name when the block ends well.

    When the block raises, or is ended by Ctrl-C or SIGTERM, the hidden folder goes and ``output``
    is what it was. With ``force``, an earlier ``output`` is removed only after its successor stands
    in its place.
    """
    check_output(output, force)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    )
    try:
        with _terminate_as_exit():
            yield partial
            partial.chmod(0o777 & ~_umask())
            _take_place(partial, output, force)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, output: Path, force: bool) -> None:
    check_output(output, force)  # it may have come while we worked
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old / output.name)
    try:
        partial.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """SIGTERM, as a batch system sends it, cleans up like any other error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_model(
    folder: Path,
    config: PluginDecoderConfig,
    tensors: Weights,
    tokenizer: Tokenizer,
    max_shard_size: str,
    say: Callable[[str], None],
) -> str:
    """Write all files of a model; returns its ``model_type``.

    A decoder that transformers knows under another name is written as that model, with its names of
    the tensors; any other with the code that runs it.
    """
    from transformers import GenerationConfig

    from ..hf.stock import stock_config

    for name, token_id in tokenizer.special_ids.items():
        setattr(config, name, token_id)
    written: Any = stock_config(config) or config
    written.architectures = [ARCHITECTURES.get(written.model_type, "PluginDecoderForCausalLM")]
    if written.model_type in ("qwen2_moe", "qwen3_moe"):
        shared = getattr(written, "shared_expert_intermediate_size", None)
        tensors = ExpertTensors(tensors, written.num_experts, shared)
    written.save_pretrained(folder)
    GenerationConfig(**tokenizer.special_ids).save_pretrained(folder)
    tokenizer.write(folder)
    write_weights(folder, tensors, max_shard_size, say)
    return str(written.model_type)


def write_weights(
    folder: Path, tensors: Weights, max_shard_size: str, say: Callable[[str], None]
) -> None:
    """Sharded safetensors and their index; one shard at a time is in memory."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split: Any = split_torch_state_dict_into_shards(
        {name: tensors.meta(name) for name in tensors}, max_shard_size=max_shard_size
    )
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), 1):
        say(f"writing {file}, {number} of {len(split.filename_to_tensors)}")
        shard: dict[str, torch.Tensor] = {name: tensors[name] for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
