"""``make check-cuda``: what can be checked of ``csrc/cuda`` and the Triton kernels without a GPU.

*Compiled:* by nvcc for each GPU that the library is built for, with the headers of whatever torch
is installed; and by Triton, without a toolkit. Then it reads what came out: the int4 products of
tensor cores must be there from sm_80 to sm_89 and nowhere else, where the assembler would make
hundreds of instructions of each; elsewhere, and in Triton, int8 ones.

*Emulated:* all of the library, with what it does on the host, by ``cuda_emulator/`` under
AddressSanitizer: tests/csrc/test_cuda.py with tensors of the CPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from shutil import which

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import setup as build

ARCHITECTURES = build.ARCHITECTURES.split(";")
INT4 = {"8.0", "8.6", "8.9"}
TRITON = {80: "mma.sync.*s8.s8", 90: "wgmma.*s8.s8", 100: "tcgen05.*kind::i8", 120: "mma.sync.*s8"}


def disassembler():
    """nvdisasm of the toolkit or of Triton; None without either."""
    if found := which("nvdisasm"):
        return found
    spec = find_spec("triton")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    found = [p / "backends/nvidia/bin/nvdisasm" for p in places]
    return next((str(p) for p in found if p.exists()), None)


def compile_one(source, architecture, folder, torch=None):
    """The machine code of one file for one GPU."""
    cubin = folder / f"{Path(source).stem}.{architecture}.cubin"
    command = build.cuda_command(torch or build.torch_folder(), [architecture])
    done = subprocess.run(
        [*command, "-cubin", source, "-o", str(cubin)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{source}, {architecture}:\n{done.stderr}"
    assert "warning" not in done.stderr, f"{source}, {architecture}:\n{done.stderr}"
    return cubin


def check_products(cubin, architecture, nvdisasm):
    """Int4 products in the code of a file with quantized layers, or int8 ones alone."""
    text = subprocess.run([nvdisasm, cubin], capture_output=True, text=True, check=True).stdout
    int4, int8 = len(re.findall(r"IMMA\.16864\.S4", text)), len(re.findall(r"IMMA.*S8", text))
    assert int8 > 0, f"{cubin.name}: no int8 products"
    assert (int4 > 0) == (architecture in INT4), f"{cubin.name}: {int4} int4 products"
    return f"{int4} int4 and {int8} int8 products"


def check_csrc(folder, jobs, torch=None):
    nvdisasm = disassembler()

    def one(task):
        source, architecture = task
        cubin = compile_one(source, architecture, folder, torch)
        words = "compiled"
        if nvdisasm and ("w4a4" in source or "moe" in source):
            words = check_products(cubin, architecture, nvdisasm)
        print(f"{source} for {architecture}: {words}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [(s, a) for s in build.sources("cuda", "cu") for a in ARCHITECTURES]))
    if not nvdisasm:
        print("no nvdisasm, in the toolkit or with Triton: machine code was not read")


def check_emulated(folder, jobs):
    """The tests of the library, as one that takes tensors of the CPU for those of a GPU."""
    torch = build.torch_folder()
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fsanitize=address"]
    flags += [build.TARGET, *build.include(torch), f"-I{ROOT / 'tests/csrc'}"]

    def one(source):
        built = folder / (Path(source).name + ".o")
        command = [compiler, *flags, "-x", "c++", "-c", source, "-o", built]
        subprocess.run(command, cwd=ROOT, check=True)
        return built

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(one, build.sources("cuda", "cu")))
    library = folder / "emulated.so"
    linked = [*objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", library]
    subprocess.run([compiler, "-shared", "-fsanitize=address", *linked], check=True)
    preloaded = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        "EMULATED": str(library),
        "TORCH_PLUGINS_NATIVE": "0",
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-s", "tests/csrc/test_cuda.py"]
    done = subprocess.run(tests, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, "the emulated library is wrong"


def check_triton():
    """The kernels' PTX for four GPUs: products must be those of tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_triton

    from torch_plugins.ops.triton.int4 import linear_kernel, quantize_kernel

    linear = dict(codes="*i8", scale="*fp32", weight="*u8", weight_scale="*bf16", zero="*fp32")
    linear |= dict(bias="*bf16", y="*bf16", rows="i32", features="i32", outputs="i32", width="i32")
    quantize = dict(x="*bf16", given_scale="*fp32", zero="*fp32", codes="*i8", scale="*fp32")
    quantize |= dict(features="i32", width="i32")
    tile = dict(GROUPS=4, SHIFTED=True, BIASED=True, ROWS=64, OUTPUTS=64, BYTES=64)
    rows = dict(BITS=4, GIVEN=False, SHIFTED=True, COLUMNS=1024)
    for capability, products in TRITON.items():
        for kernel, signature, constants in (
            (linear_kernel, linear, tile),
            (quantize_kernel, quantize, rows),
        ):
            signature = signature | dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature, constexprs=constants)
            options = {"enable_fp_fusion": False}
            ptx = compile_triton(source, GPUTarget("cuda", capability, 32), options).asm["ptx"]
            assert "fma.rn.f32" not in ptx, f"Triton, sm_{capability}: products and sums are fused"
            if kernel is linear_kernel:
                assert re.search(products, ptx), f"Triton, sm_{capability}: no {products}"
                print(f"Triton for sm_{capability}: {re.search(products, ptx).group()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--torch", type=Path, help="another torch's folder, for its headers")
    options = parser.parse_args()
    if which(nvcc := build.cuda_command(Path(), [])[0]) is None:
        sys.exit(f"{nvcc} not found: install the CUDA toolkit, or say NVCC=/path/to/nvcc")
    with tempfile.TemporaryDirectory() as folder:
        check_emulated(Path(folder), options.jobs)
        check_csrc(Path(folder), options.jobs, options.torch)
    if find_spec("triton"):
        check_triton()
    else:
        print("no Triton: its kernels were not compiled")


if __name__ == "__main__":
    main()
