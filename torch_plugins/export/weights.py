"""Weights between a folder of safetensors and a model without memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..feature import ConfigError
from .writer import INDEX

WEIGHTS = "model.safetensors"


def tensor_files(path: Path) -> dict[str, str]:
    """Tensor -> file in the folder.

    Raises:
        ConfigError: its weights are no safetensors, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index, single = path / INDEX, path / WEIGHTS
    if index.is_file():
        weights: dict[str, str] = json.loads(index.read_text())["weight_map"]
        for file in sorted(set(weights.values())):
            if Path(file).name != file:
                raise ConfigError(f"{index}: refused, it refers to the file {file!r} outside")
            if not (path / file).is_file():
                raise ConfigError(f"{index}: it names {file}, which is not there")
        return weights
    if not single.is_file():
        pickles = [file.name for file in (*path.glob("*.bin"), *path.glob("*.pt*"))]
        hint = f"{', '.join(sorted(pickles)[:3])}: pickles are not read; " if pickles else ""
        raise ConfigError(
            f"{path}: neither {WEIGHTS} nor {INDEX}; {hint}save the model with transformers' "
            "save_pretrained"
        )
    try:
        with safe_open(single, "pt") as opened:
            return dict.fromkeys(opened.keys(), WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{single}: cannot be read ({error})") from error


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors into a model's parameters and buffers, by name, in place of those there."""
    for name, tensor in tensors:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[last] = tensor


def empty(module: nn.Module) -> None:
    """Put a module's parameters back on ``meta``."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; buffers, which no file may have, are
    real."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    host: Any = nn.Module
    host.register_parameter = register
    try:
        yield
    finally:
        host.register_parameter = plain
