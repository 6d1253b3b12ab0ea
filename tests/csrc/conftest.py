"""Tests of native operators run on the library that the package has loaded, or on the one that
``TEST_LIBRARY`` names: that with sanitizers, see test_sanitizers.py."""

import os

import pytest
import torch

from torch_plugins import native

EXAMPLES = int(os.environ.get("EXAMPLES", "120"))
"""Of hypothesis, for each property."""


@pytest.fixture(scope="session")
def library():
    """The CPU library; tests of it are skipped where it is not built."""
    if path := os.environ.get("TEST_LIBRARY"):
        import torch_plugins.ops  # noqa: F401

        assert native.load()["cpu"].startswith("off")
        torch.ops.load_library(path)
    elif not native.active("cpu"):
        pytest.skip(f"CPU operators: {native.load()['cpu']}")


@pytest.fixture
def threads():
    """Set the number of threads; it is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
