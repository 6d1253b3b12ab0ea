"""The processor: its name, the instructions that matter here, its caches, and cores to run on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

SYSTEM = Path("/sys/devices/system/cpu")
FLAGS = (
    "avx2 avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16 "
    "asimd asimddp i8mm bf16 sve sve2"
).split()
"""As Linux names them, of x86 and of Arm."""


def describe() -> dict[str, object]:
    """Name, flags, cores that may be used, bytes of each cache, and how busy it is."""
    text = _read(Path("/proc/cpuinfo"))
    found: dict[str, str] = dict(re.findall(r"^([^:\n]*?)\s*:\s*(.*)$", text, re.MULTILINE))
    present = set((found.get("flags") or found.get("Features", "")).split())
    return {
        "cpu": found.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": len(cores()),
        "caches": caches(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "system": f"{platform.system()} {platform.release()}",
    }


def caches() -> dict[str, int]:
    """Bytes of the caches that the first core sees: ``{"L1": ..., "L2": ..., "L3": ...}``."""
    sizes = {}
    for folder in sorted(SYSTEM.glob("cpu0/cache/index*")):
        size = re.fullmatch(r"(\d+)([KM])", _read(folder / "size"))
        if size and _read(folder / "type") != "Instruction":
            scale = {"K": 2**10, "M": 2**20}[size[2]]
            sizes[f"L{_read(folder / 'level')}"] = int(size[1]) * scale
    return sizes


def cores() -> list[int]:
    """Numbers of the cores that this process may use, one for each physical core."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    chosen, seen = [], set()
    for number in sorted(os.sched_getaffinity(0)):
        siblings = _read(SYSTEM / f"cpu{number}/topology/thread_siblings_list") or str(number)
        if siblings not in seen:
            seen.add(siblings)
            chosen.append(number)
    return chosen


def pin(threads: int) -> None:
    """Keep this process, and what it starts, on as many cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[-threads:])  # the first ones serve interrupts


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
