"""Builds ``csrc/`` into ``torch_plugins/lib``; all metadata is in pyproject.toml.

``TORCH_PLUGINS_BUILD`` says what to build:

=========  ==================================================================================
``auto``   the default: the CPU library, and the CUDA library where there is a GPU; a warning
           where one cannot be built, never an error
``0``      nothing: every operator runs in Python
``cpu``    the CPU library, or an error
``cuda``   both libraries, or an error; ``TORCH_CUDA_ARCH_LIST="8.0;9.0a"`` narrows the GPUs
=========  ==================================================================================

The libraries use torch's stable ABI of 2.10: one that is built serves every torch since. Neither
torch nor Python is imported by them or by this file; torch's headers are looked for beside pip's
own packages too, so that pip's isolated builds find them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", TARGET]
# Products and sums stay apart, as in torch's own kernels: results are then those of the references.
# GCC 12 warns of its own intrinsics as uninitialized.
CPU = [*COMMON, "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CPU += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c".split()
BY_SUFFIX = {
    "x86_64": {
        "_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "_avx512": AVX512,
        "_amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
    },
    "aarch64": {"_neon": ["-march=armv8.2-a+dotprod"]},
}
"""Files of one instruction set; those of the other machine are left out."""
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0a;12.0a"


class Missing(Exception):
    """What a library needs and this machine lacks."""


class Build(build_ext):
    def build_extension(self, extension: Extension) -> None:
        wanted = os.environ.get("TORCH_PLUGINS_BUILD", "auto")
        if wanted not in ("auto", "0", "cpu", "cuda"):
            raise SystemExit(f"TORCH_PLUGINS_BUILD={wanted}: must be auto, 0, cpu or cuda")
        cuda = extension.name.endswith("cuda")
        if wanted == "0" or (cuda and wanted != "cuda" and not (wanted == "auto" and has_gpu())):
            return
        try:
            (self.build_cuda if cuda else self.build_cpu)(extension)
        except Missing as missing:
            if wanted != "auto":
                raise SystemExit(f"TORCH_PLUGINS_BUILD={wanted}: {missing}") from None
            kind = "CUDA" if cuda else "CPU"
            warnings.warn(f"no native {kind} operators: {missing}", stacklevel=1)

    def build_cpu(self, extension: Extension) -> None:
        torch = torch_folder()
        compiler, own = os.environ.get("CXX", "c++"), os.environ.get("CXXFLAGS", "").split()
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
            platform.machine().lower(), platform.machine()
        )
        jobs = []
        for source in extension.sources:
            suffix = next(
                (s for of in BY_SUFFIX.values() for s in of if Path(source).stem.endswith(s)), ""
            )
            flags = BY_SUFFIX.get(machine, {}).get(suffix) if suffix else []
            if flags is not None:
                jobs.append((source, [compiler, *CPU, *flags, *own, *include(torch)]))
        objects = self.compile(jobs)
        link = [compiler, "-shared", *own, *objects, f"-L{torch}/lib", "-ltorch_cpu"]
        self.link(link, extension)

    def build_cuda(self, extension: Extension) -> None:
        torch = torch_folder()
        if not list((torch / "lib").glob("*torch_cuda*")):
            raise Missing("the installed torch is not a CUDA build")
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(" ", ";")
        command = cuda_command(torch, [a for a in asked.split(";") if a])
        jobs = [(s, command) for s in extension.sources]
        objects = self.compile(jobs)
        libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch_cuda"]
        self.link([command[0], "-shared", "-cudart=static", *objects, *libraries], extension)

    def compile(self, jobs: list[tuple[str, list[str]]]) -> list[str]:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def one(job: tuple[str, list[str]]) -> str:
            source, command = job
            built = folder / (source.replace(os.sep, "_") + ".o")
            run([*command, "-c", source, "-o", str(built)])
            return str(built)

        workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, jobs))

    def link(self, command: list[str], extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a library that a process has loaded is not written into.
        fresh = library.with_suffix(f".{os.getpid()}")
        run([*command, "-o", str(fresh)])
        fresh.replace(library)

    def get_ext_filename(self, name: str) -> str:
        package, _, last = name.rpartition(".")
        ending = ".dylib" if sys.platform == "darwin" else ".so"
        return os.path.join(*package.split("."), f"lib{last}{ending}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        """For editable installs: what was built."""
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            if (built := Path(self.build_lib, name)).exists():
                (ROOT / name).parent.mkdir(exist_ok=True)
                built.replace(ROOT / name)


class Wheel(bdist_wheel):
    """No Python ABI is used: one wheel serves every Python on the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, system = super().get_tag()
        return "py3", "none", system


def torch_folder() -> Path:
    """The installed torch, found without importing it.

    Raises:
        Missing: not there, or older than the stable ABI.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").is_file():
            if (place / "include/torch/headeronly/core/Dispatch.h").is_file():
                return place
            raise Missing(f"{place} is older than torch 2.10")
    raise Missing("torch >= 2.10 is not installed where this builds: install it, then these again")


def has_gpu() -> bool:
    return any(Path(f"/dev/{device}").exists() for device in ("nvidiactl", "dxg"))


def cuda_command(torch: Path, architectures: list[str]) -> list[str]:
    """nvcc for these GPUs (``["8.0", "9.0a"]``); a torch for CPUs has all headers, too."""
    numbers = [a.replace(".", "") for a in architectures]
    return [
        os.environ.get("NVCC", "nvcc"),
        "-O3",
        "-std=c++17",
        "-fmad=false",  # products and sums apart, as above
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        TARGET,
        *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers),
        *include(torch),
        *(f"-I{folder}" for folder in sorted(torch.parent.glob("nvidia/cu*/include"))),
    ]


def include(torch: Path) -> list[str]:
    return [f"-I{ROOT / 'csrc'}", "-isystem", f"{torch / 'include'}"]


def run(command: list[str]) -> None:
    """Raises Missing where the compiler is not there or fails, with its words."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"{command[0]}: {error.strerror}") from None
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def sources(folder: str, ending: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/{folder}/*.{ending}"))


if __name__ == "__main__":  # pip, too, runs it as that; tests/csrc/check_cuda.py imports it
    setup(
        ext_modules=[
            Extension("torch_plugins.lib.torch_plugins_cpu", sources("cpu", "cpp")),
            *(
                [Extension("torch_plugins.lib.torch_plugins_cuda", found)]
                if (found := sources("cuda", "cu"))
                else []
            ),
        ],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    )
