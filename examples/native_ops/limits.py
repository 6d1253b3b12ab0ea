"""What the machine can do at most, measured by ``limits.c``, and the time that work then takes.

A computation that reads B bytes and does P operations takes no less than

    floor = max(B / bandwidth, P / peak)

with the bandwidth of the last cache where the bytes fit in it and are there, else of the memory.
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
    int8: float | None = None
    bf16: float | None = None
    names: dict[str, str] = field(default_factory=dict)
    """The instructions of each peak; or why a rate was not measured."""

    def near(self, size: float) -> bool:
        """Whether so many bytes stay in the last cache."""
        return size <= ROOM * self.l3_bytes

    def floor(
        self, read: float, operations: float = 0, kind: str = "bf16", cold: bool = False
    ) -> float | None:
        """Seconds; None where a rate that it takes was not measured.

        Args:
            read: bytes, read or written.
            kind: of the operations: ``int8`` or ``bf16``.
            cold: whether the bytes come from memory though they fit in the cache.
        """
        near = not cold and self.near(read)
        bandwidth, peak = self.l3 if near else self.dram, getattr(self, kind)
        if not bandwidth or (operations and not peak):
            return None
        return max(read / bandwidth, operations / peak if operations else 0)


def measure(threads: int, l3_bytes: int) -> Limits:
    """All of them, in about two seconds and one compilation."""
    names: dict[str, str] = {}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "limits")
        problem = _compile(program)
        sets = {"dram": max(4 * l3_bytes, 256 * MEBI), "l3": l3_bytes // 2, "int8": 0, "bf16": 0}
        for name, size in sets.items():
            if problem or (name == "l3" and not l3_bytes):
                names[name] = problem or "the size of the last cache is not known"
                continue
            what = "read" if name in ("dram", "l3") else name
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
