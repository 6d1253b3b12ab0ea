"""Every instruction set of this machine, and every file of csrc/cpu under sanitizers.

AMX is emulated in the library with sanitizers, so that its kernels run on any machine with AVX-512.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_plugins import native

ROOT = Path(__file__).parents[2]
OPERATORS = [
    f"tests/csrc/test_{name}.py"
    for name in ("w4a4_linear", "sparse_moe", "fake_quant", "kurtosis", "residual_add_rms_norm")
    if (ROOT / f"tests/csrc/test_{name}.py").exists()
]
ORDER = ("portable", "avx2", "avx512", "amx")
ALIKE = "not conventions and not compiled and not decodes"  # on every level
FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -DAMX_EMULATED"


def run(level, **environment):
    """The tests of all operators in another process, at one level; it shares them with nobody."""
    environment |= {"TORCH_PLUGINS_CPU": level, "EXAMPLES": "24"}
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *OPERATORS, "-k", ALIKE],
        cwd=ROOT,
        env=alone | environment,
        capture_output=True,
        text=True,
    )
    words = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, words
    assert " passed" in done.stdout, words
    assert "skipped" not in done.stdout.splitlines()[-1], words


@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_every_level_below_the_best(level, library):
    best = native.load()["cpu"].removeprefix("active: ")
    if best not in ORDER or ORDER.index(level) >= ORDER.index(best):
        pytest.skip(f"this machine's level is {best}")
    run(level)


@pytest.fixture(scope="module")
def sanitized():
    """The CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, built once."""
    sources = [
        p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file() and "cuda" not in p.parts
    ]
    content = b"".join(p.read_bytes() for p in [*sources, ROOT / "setup.py"]) + FLAGS.encode()
    folder = ROOT / "build" / f"sanitized-{hashlib.sha256(content).hexdigest()[:16]}"
    built = folder / "torch_plugins/lib/libtorch_plugins_cpu.so"
    if not built.exists():
        done = subprocess.run(
            [
                sys.executable,
                "setup.py",
                "-q",
                "build_ext",
                "-b",
                folder,
                "-t",
                f"{folder}-objects",
            ],
            cwd=ROOT,
            env=os.environ | {"CXXFLAGS": FLAGS, "TORCH_PLUGINS_BUILD": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return built


def preload():
    """The sanitizer's library, which must come first, and the C++ library that it looks for."""
    names = ("libasan.so", "libstdc++.so")
    compiler = os.environ.get("CXX", "c++")
    find = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True) for name in names
    ]
    return " ".join(path.strip() for path in find)


@pytest.mark.parametrize("level", ["amx", "avx2"])
def test_sanitizers_find_nothing(level, library, sanitized):
    best = native.load()["cpu"].removeprefix("active: ")
    if ORDER.index(best) < ORDER.index("avx512" if level == "amx" else level):
        pytest.skip(f"this machine's level is {best}; the kernels of AMX use AVX-512 too")
    run(
        level,
        TEST_LIBRARY=str(sanitized),
        TORCH_PLUGINS_NATIVE="0",
        LD_PRELOAD=preload(),
        ASAN_OPTIONS="detect_leaks=0",
    )
