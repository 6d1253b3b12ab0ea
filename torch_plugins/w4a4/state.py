"""What an interrupted quantization has finished: a hidden folder beside its output.

``run.json`` says what the run is; each finished layer has a file, which appears whole or not at
all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..feature import ConfigError


class State:
    """Finished layers of one run.

    Args:
        output: what the run writes.
        fingerprint: what a run must have in common with the one that it continues, JSON values.
        restart: forget an earlier run.

    Raises:
        ConfigError: an earlier run differs.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = output.parent / f".{output.name}.quantizing"
        run = self.folder / "run.json"
        if restart:
            self.remove()
        if run.is_file():
            self._compare(json.loads(run.read_text()), fingerprint, output)
        self.folder.mkdir(exist_ok=True)
        run.write_text(json.dumps(fingerprint, indent=2) + "\n")

    def _compare(
        self, earlier: dict[str, Any], fingerprint: Mapping[str, Any], output: Path
    ) -> None:
        for name in sorted(earlier.keys() | fingerprint.keys()):
            was, now = earlier.get(name), fingerprint.get(name)
            if was != now:
                raise ConfigError(
                    f"{output}: an interrupted run is here whose {name} was {was}, not {now}; "
                    "give the same to go on with it, or --restart to forget it"
                )

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        return self._file(index).is_file()

    def save(self, index: int, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        partial = self._file(index).with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, self._file(index))

    def load(self, index: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._file(index))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
