"""The index builder of the datasets: compiled only where it is missing, and by this Python."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from megatron_plugins.cpu.piece import Piece, replace


def _compile_helpers(module: ModuleType) -> None:
    upstream = module.compile_helpers

    @functools.wraps(upstream)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
            return
        # The Makefile asks the first python3 and python3-config on PATH for headers and suffix.
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "MAKEFLAGS": f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}",
        }
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            upstream()
        finally:
            os.environ.clear()
            os.environ.update(before)
        importlib.invalidate_caches()

    replace(module, "compile_helpers", compile_helpers)


PIECES = (
    Piece(
        "dataset-helpers",
        "a wheel ships the built index builder without the Makefile that compile_helpers runs; a "
        "checkout's Makefile trusts whatever python3 is first on PATH",
        "the training loop",
        modules={"megatron.core.datasets.utils": _compile_helpers},
    ),
)
