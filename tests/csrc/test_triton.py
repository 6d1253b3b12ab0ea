"""The Triton kernels: by Triton's interpreter against the references, and when they serve."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from torch_plugins.ops import int4  # noqa: F401
from torch_plugins.ops import triton as kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton here")
def test_the_interpreter_agrees_with_the_reference():
    done = subprocess.run(
        [sys.executable, "tests/csrc/triton_cases.py"],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["exact"] * 6


def test_it_serves_gpus_without_the_cuda_library():
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    there = registered("torch_plugins::w4a4_linear", "CUDA")
    state = kernels.native.load()["cuda"]
    by_triton = not state.startswith("off") and find_spec("triton") is not None
    assert there == (state.startswith("active") or by_triton)


@pytest.mark.parametrize("state", ["active", "off: TORCH_PLUGINS_NATIVE=0"])
def test_it_leaves_gpus_to_the_cuda_library(monkeypatch, state):
    monkeypatch.setattr(kernels.native, "load", lambda: {"cuda": state})
    assert not kernels.register()


def test_no_triton_no_kernels(monkeypatch):
    monkeypatch.setattr(kernels.native, "load", lambda: {"cuda": "not built"})
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert not kernels.register()
