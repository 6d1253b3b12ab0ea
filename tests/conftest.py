"""Several processes of pytest share the tests, as ``make test`` has them do (``-n 2``).

They share them by whole files: what a file makes for its tests, and ``parity/conftest.py`` for all
of its folder, is made once. A test marked ``quiet`` measures time, and has the machine to itself.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ORDER = ("parity", "megatron", "deepspeed", "hf")
"""The folders whose files take long come first, so that little is waited for at the end."""

SHARED = "PYTEST_XDIST_WORKER" in os.environ
if SHARED:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each would start a thread on every core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(TESTS).parts[0]
        if item.get_closest_marker("quiet"):
            return len(ORDER) + 1
        return ORDER.index(folder) if folder in ORDER else len(ORDER)

    if SHARED:
        items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "parity" if file.startswith("tests/parity/") else file

    config.option.loadscopereorder = False
    return Files(config, log)


@contextmanager
def lock(path: Path, kind: int) -> Iterator[None]:
    """Hold an advisory lock on a file or folder, after waiting for it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(opened, kind)
        yield
        fcntl.flock(opened, fcntl.LOCK_UN)  # children that were forked have it open too
    finally:
        os.close(opened)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests run together, a quiet one alone: those of others wait from when it begins to wait."""
    quiet = item.get_closest_marker("quiet")
    kind = fcntl.LOCK_EX if quiet else fcntl.LOCK_SH
    with ExitStack() as stack:
        if SHARED:
            with lock(TESTS / "conftest.py", fcntl.LOCK_EX):
                stack.enter_context(lock(TESTS, kind))
        return (yield)
