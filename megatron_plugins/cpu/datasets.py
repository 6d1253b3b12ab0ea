"""The index builder of the datasets is compiled only where it is missing."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

from megatron_plugins.cpu.piece import Piece, replace


def _compile_helpers(module: ModuleType) -> None:
    upstream = module.compile_helpers

    @functools.wraps(upstream)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            upstream()

    replace(module, "compile_helpers", compile_helpers)


PIECES = (
    Piece(
        "dataset-helpers",
        "a wheel ships the built index builder without the Makefile that compile_helpers runs",
        "the training loop of an installed wheel",
        modules={"megatron.core.datasets.utils": _compile_helpers},
    ),
)
