"""Kernels of ``csrc/cuda`` on the host: builds the programs of ``cuda_emulator/`` and runs them.

A program has the kernels' own source, under AddressSanitizer and UndefinedBehaviorSanitizer. It
ends at the first error; what it says is then the text of :class:`Crash`.
"""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FLAGS = [
    "-std=c++17",
    "-O0",
    "-g1",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Crash(Exception):
    """What the program printed before it ended."""


class Out:
    """An argument that the kernel writes."""

    def __init__(self, shape, dtype=torch.float32):
        self.tensor = torch.empty(shape, dtype=dtype)


def build(name, folder, changes=(), flags=()):
    """The program of ``cuda_emulator/<name>.cpp``.

    Args:
        changes: ``(file, old, new)`` of ``csrc/cuda``: a broken kernel, or a smaller constant.
        flags: of the compiler, behind the others.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or sys.platform != "linux":
        pytest.skip("the emulator needs Linux and a C++ compiler")
    include = [ROOT / "csrc"]
    if changes:
        include.insert(0, folder / "changed")
        (folder / "changed/cuda").mkdir(parents=True)
        for source in (ROOT / "csrc/cuda").iterdir():
            text = source.read_text()
            for file, old, new in changes:
                if file == source.name:
                    assert text.count(old) == 1, (file, old)
                    text = text.replace(old, new)
            (folder / "changed/cuda" / source.name).write_text(text)
    program = folder / name
    command = [compiler, *FLAGS, *flags, *(f"-I{path}" for path in include)]
    command += [f"-I{ROOT / 'tests/csrc'}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
    command += [str(ROOT / f"tests/csrc/cuda_emulator/{name}.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return program


class Emulator:
    """A program that is kept running: one kernel after the other."""

    def __init__(self, program):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **OPTIONS},
        )

    def run(self, kernel, *arguments, seed=0):
        """The tensors of the :class:`Out` arguments.

        Args:
            arguments: tensors, None, Out, integers and floats, as the program takes them.
        """
        request = [struct.pack("I", len(kernel)), kernel.encode(), struct.pack("Q", seed)]
        request.append(struct.pack("I", len(arguments)))
        request += [packed(argument) for argument in arguments]
        outs = [argument.tensor for argument in arguments if isinstance(argument, Out)]
        try:
            self.process.stdin.write(b"".join(request))
            self.process.stdin.flush()
            return [self.result(out) for out in outs]
        except (BrokenPipeError, EOFError):
            self.process.wait()
            self.errors.seek(0)
            raise Crash(self.errors.read().decode()) from None

    def result(self, out):
        size = out.numel() * out.element_size()
        if not size:
            return out
        data = bytearray(self.process.stdout.read(size))
        if len(data) < size:
            raise EOFError
        return torch.frombuffer(data, dtype=out.dtype).reshape(out.shape)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def packed(argument):
    if isinstance(argument, Out):
        return struct.pack("=cq", b"o", argument.tensor.numel() * argument.tensor.element_size())
    if argument is None:
        return struct.pack("=cq", b"b", -1)
    if isinstance(argument, torch.Tensor):
        data = bytes(argument.contiguous().view(-1).view(torch.uint8).numpy())
        return struct.pack("=cq", b"b", len(data)) + data
    if isinstance(argument, float):
        return struct.pack("=cd", b"f", argument)
    return struct.pack("=cq", b"i", int(argument))
