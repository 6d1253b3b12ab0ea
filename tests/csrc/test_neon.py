"""NEON's kernels: built for aarch64, and run there or under qemu's user mode."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("w4a4_neon", "w4a4_portable", "experts_neon", "experts_portable", "w4a4_weight")


def flags(name):
    """Those of setup.py, which is not imported: it would build."""
    text = (ROOT / "setup.py").read_text()
    line = next(line for line in text.splitlines() if '"_neon": [' in line)
    return line.split('["')[1].split('"]')[0].split('", "') if name.endswith("_neon") else []


def test_neon_equals_portable(tmp_path):
    here = platform.machine() in ("aarch64", "arm64")
    compiler, emulator = ("c++", "") if here else ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    for tool in filter(None, (compiler, emulator)):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: apt install g++-aarch64-linux-gnu qemu-user-static")
    common = [compiler, "-O2", "-std=c++17", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-c"]
    objects = [tmp_path / "neon.o"]
    subprocess.run([*common, ROOT / "tests/csrc/neon.cpp", "-o", objects[0]], check=True)
    for name in SOURCES:
        objects.append(tmp_path / f"{name}.o")
        source = ROOT / f"csrc/cpu/{name}.cpp"
        subprocess.run([*common, *flags(name), source, "-o", objects[-1]], check=True)
    subprocess.run([compiler, "-static", *objects, "-o", tmp_path / "neon"], check=True)
    found = subprocess.check_output([*filter(None, [emulator]), tmp_path / "neon"], text=True)
    assert found.startswith("0 of "), found
