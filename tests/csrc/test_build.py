"""Building: what a user types, with and without compilers; nothing here needs a network."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = ("_avx2", "_avx512", "_amx", "_neon")
LIBRARY = "torch_plugins/lib/libtorch_plugins_cpu.so"


def python(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "TORCH_PLUGINS_BUILD"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = python("setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_is_complete(source):
    listed = subprocess.check_output(["git", "ls-files", "csrc"], cwd=ROOT, text=True).split()
    assert listed
    assert not [path for path in (*listed, "setup.py", "LICENSE") if not (source / path).is_file()]


def build_ext(source, folder, **environment):
    return python(
        "setup.py", "-q", "build_ext", "-b", folder, "-t", folder / "o", cwd=source, **environment
    )


def test_a_wheel_serves_every_python(source, tmp_path):
    """Built as a frontend without isolation does, by another compiler command and to the end."""
    done = python(
        *("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."),
        cwd=source,
        TORCH_PLUGINS_BUILD="cpu",
        CXXFLAGS="-O0",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        assert LIBRARY in packed.namelist()
        packed.extractall(tmp_path)
    script = "from torch_plugins import native; print(native.__file__, native.load()['cpu'])"
    done = python("-c", script, cwd=tmp_path)
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    assert " active: " in done.stdout
    names = subprocess.run(["nm", "-D", tmp_path / LIBRARY], capture_output=True, text=True).stdout
    wanted = [line.split()[-1] for line in names.splitlines() if " U " in line]
    assert not [name for name in wanted if name.startswith(("Py", "_ZN2at", "_ZN3c10", "_ZNK2at"))]
    assert any(name.startswith("aoti_torch_") for name in wanted)


MISSING = {"CXX": "no-such-compiler", "PATH": os.environ["PATH"]}


def test_without_a_compiler_the_package_still_installs(source, tmp_path):
    done = build_ext(source, tmp_path, **MISSING)
    assert done.returncode == 0, done.stderr
    assert "no native CPU operators: no-such-compiler" in done.stderr
    assert not (tmp_path / LIBRARY).exists()


def test_a_compiler_that_fails_stops_only_who_insists(source, tmp_path):
    broken = {"CXXFLAGS": "-no-such-flag"}
    done = build_ext(source, tmp_path, **broken)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stderr
    done = build_ext(source, tmp_path, TORCH_PLUGINS_BUILD="cpu", **broken)
    assert done.returncode != 0
    assert "TORCH_PLUGINS_BUILD=cpu: " in done.stderr
    assert "-no-such-flag" in done.stderr


@pytest.mark.parametrize("value", ["0", "yes"])
def test_the_variable(value, source, tmp_path):
    done = build_ext(source, tmp_path, TORCH_PLUGINS_BUILD=value, **MISSING)
    if value == "0":
        assert done.returncode == 0
        assert "no native" not in done.stderr
    else:
        assert done.returncode != 0
        assert "TORCH_PLUGINS_BUILD=yes: must be auto, 0, cpu or cuda" in done.stderr


def test_without_torch_the_package_still_installs(source, tmp_path):
    """As in an environment where torch is installed afterwards: setuptools, and nothing else."""
    import setuptools

    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    command = [sys._base_executable, "-S", "setup.py", "-q", "build_ext"]
    done = subprocess.run(
        [*command, "-b", tmp_path, "-t", tmp_path],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torch >= 2.10 is not installed where this builds" in done.stderr
    assert not (tmp_path / LIBRARY).exists()


def test_files_of_one_instruction_set_share_no_function():
    """Of a weak symbol the linker keeps one copy: perhaps that of another instruction set."""
    files = [p for p in ROOT.glob("build/temp*/csrc_cpu_*.o") if p.name[:-6].endswith(INSTRUCTIONS)]
    if not files:
        pytest.skip("make env has not built the CPU library, so there are no objects")
    for file in files:
        names = subprocess.check_output(["nm", "-C", file], text=True).splitlines()
        assert not [name for name in names if name[17:18] in "WVu"], file.name


def test_off_by_a_variable():
    script = "from torch_plugins import native; print(native.load(), native.active())"
    done = python("-c", script, TORCH_PLUGINS_NATIVE="0")
    assert "'cpu': 'off: TORCH_PLUGINS_NATIVE=0'" in done.stdout
    assert done.stdout.rstrip().endswith("False")


def test_a_library_that_does_not_load_is_no_end(tmp_path):
    (tmp_path / "libtorch_plugins_cpu.so").write_bytes(b"not a library")
    script = f"""
from pathlib import Path
from torch_plugins import native
native.FOLDER = Path({str(tmp_path)!r})
import torch, torch_plugins.ops.int4 as ops
assert native.load()["cpu"].startswith("cannot be loaded"), native.load()
assert not native.active()
weight = torch.tensor([[0x99]], dtype=torch.uint8)
print(ops.w4a4_linear(torch.ones(1, 2), weight, torch.ones(1, 1)))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded, operators run in Python" in done.stderr
    assert "tensor([[1" in done.stdout
