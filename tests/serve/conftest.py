"""vLLM on CPU, one process a model; what transformers computes comes from another process.

These tests run where vLLM does: ``make serve-check`` builds such an environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.families import FAMILIES

ROOT = Path(__file__).parents[2]
TIMEOUT = 900
NEW_TOKENS = 16
KV_BYTES = 2**30

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask tensor-parallel workers for their model
    "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES // 2**30),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="session")
def vllm_works() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: run make serve-check")
    run = python("-c", "import vllm")
    if run.returncode:
        pytest.skip(f"vLLM does not import here: {run.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def folder(vllm_works: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported model a family, with what transformers computes beside it."""
    work = tmp_path_factory.mktemp("serve")
    run = python("-m", "tests.serve.reference", work)
    assert run.returncode == 0, run.stderr[-4000:]
    return work


@pytest.fixture(scope="session")
def reference(folder: Path) -> Callable[[str], dict[str, Any]]:
    return lambda name: json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def engine(
    folder: Path, reference: Callable[[str], dict[str, Any]], tmp_path_factory: Any
) -> Callable[..., dict[str, Any]]:
    """Run vLLM on a family's model with some options."""

    def run(name: str, refused: list[dict[str, Any]] | None = None, **options: Any) -> Any:
        environment = options.pop("environment", {})
        work = tmp_path_factory.mktemp("engine")
        job = {
            "folder": str(folder / name),
            "prompts": reference(name)["prompts"],
            "new_tokens": NEW_TOKENS,
            "options": FAMILIES[name].options | options,
            "refused": refused,
        }
        asked = [job["options"], *(refused or [])]
        if any(name.endswith("_parallel_size") for options in asked for name in options):
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        (work / "job.json").write_text(json.dumps(job))
        files = work / "job.json", work / "result.json"
        process = python("-m", "tests.serve.engine", *files, **environment)
        assert process.returncode == 0, process.stderr[-4000:]
        result = json.loads(files[1].read_text())
        return result | {"log": process.stdout + process.stderr}

    return run


@pytest.fixture(scope="session")
def served(engine: Callable[..., dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """What vLLM computes for a family; each is run once."""
    done: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in done:
            done[name] = engine(name)
        return done[name]

    return run
