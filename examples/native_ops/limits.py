"""What the machine can do at most, measured by ``limits.c``, and the time that work then takes.

A computation that reads B bytes and does P operations takes no less than

    floor = max(B / bandwidth, P / peak)

with the bandwidth of the last cache where the bytes fit in it and are there, else of the memory;
that of copying, read and written bytes together, where about as much is written as is read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
ROOM = 0.8
"""Share of the last cache that one computation can have."""
MEBI = 2**20


@dataclass(frozen=True)
class Limits:
    """Bytes and operations a second, of so many threads at once; None: not measured."""

    threads: int
    l3_bytes: int = 0
    dram: float | None = None
    l3: float | None = None
    dram_copy: float | None = None
    l3_copy: float | None = None
    int8: float | None = None
    bf16: float | None = None
    names: dict[str, str] = field(default_factory=dict)
    """The instructions of each peak; or why a rate was not measured."""

    def near(self, size: float) -> bool:
        """Whether so many bytes stay in the last cache."""
        return size <= ROOM * self.l3_bytes

    def floor(
        self,
        size: float,
        operations: float = 0,
        kind: str = "bf16",
        cold: bool = False,
        copied: bool = False,
    ) -> float | None:
        """Seconds; None where a rate that it takes was not measured.

        Args:
            size: bytes, read or written.
            kind: of the operations: ``int8`` or ``bf16``.
            cold: whether the bytes come from memory though they fit in the cache.
            copied: whether about half of them are written.
        """
        place = "dram" if cold or not self.near(size) else "l3"
        bandwidth: float | None = getattr(self, place + "_copy" if copied else place)
        peak: float | None = getattr(self, kind)
        if not bandwidth or (operations and not peak):
            return None
        return max(size / bandwidth, operations / peak if peak else 0)


def measure(threads: int, l3_bytes: int) -> Limits:
    """All of them, in about two seconds and one compilation."""
    names: dict[str, str] = {}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "limits")
        problem = _compile(program)
        far, near = max(4 * l3_bytes, 256 * MEBI), l3_bytes // 2
        for name, what, size in (
            ("dram", "read", far),
            ("dram_copy", "copy", far),
            ("l3", "read", near),
            ("l3_copy", "copy", near),
            ("int8", "int8", 0),
            ("bf16", "bf16", 0),
        ):
            if problem or (name.startswith("l3") and not l3_bytes):
                names[name] = problem or "the size of the last cache is not known"
                continue
            command = [str(program), what, str(size), str(threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                names[name] = "no instructions for it" if done.returncode == 3 else "it failed"
            else:
                rate, _, names[name] = done.stdout.strip().partition(" ")
                rates[name] = float(rate)
    return Limits(threads, l3_bytes, **rates, names=names)


def _compile(program: Path) -> str:
    """Build the program; what was wrong, or nothing."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        return "there is no C compiler"
    for machine in ("-march=native", "-mcpu=native"):
        command = [compiler, "-O3", machine, "-pthread", str(SOURCE), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            return ""
    return f"{compiler} failed: {done.stderr.strip()[-200:]}"
