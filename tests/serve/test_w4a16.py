"""Weights of four bits in vLLM: its own kernel, against transformers on the dequantized weights."""

from __future__ import annotations

import json

import pytest

from tests.serve.conftest import NEW_TOKENS, python
from tests.serve.test_plugin_decoder import distance

REGRET = 0.05


@pytest.fixture(scope="module")
def work(vllm_works, tmp_path_factory):
    work = tmp_path_factory.mktemp("w4a16")
    run = python("-m", "tests.serve.quantized", "build", work)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "max abs difference" in run.stdout
    return work


@pytest.fixture(scope="module")
def served(work):
    """What vLLM computes in fp16, its log, and what transformers says of its tokens."""
    job = {
        "folder": str(work / "w4a16"),
        "prompts": json.loads((work / "prompts.json").read_text()),
        "new_tokens": NEW_TOKENS,
        "options": {"dtype": "float16"},
        "refused": None,
    }
    (work / "job.json").write_text(json.dumps(job))
    run = python("-m", "tests.serve.engine", work / "job.json", work / "result.json")
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads((work / "result.json").read_text())
    (work / "tokens.json").write_text(json.dumps(result["tokens"][0]))
    judged = python("-m", "tests.serve.quantized", "judge", work)
    assert judged.returncode == 0, judged.stderr[-4000:]
    return result, run.stdout + run.stderr, json.loads((work / "verdict.json").read_text())


def test_vllm_computes_the_quantized_model(served):
    result, log, verdict = served
    assert "CPUWNA16LinearKernel" in log
    far = {name: distance(result["logprobs"], one["logprobs"]) for name, one in verdict.items()}
    print(
        f"log-probabilities differ by {far}, regrets "
        f"{ {name: one['regret'] for name, one in verdict.items()} }"
    )
    assert verdict["w4a16"]["regret"] < REGRET
    assert far["w4a16"] < 0.1
    assert min(far["plain"], far["wrong"]) > 5 * far["w4a16"]
    assert min(verdict["plain"]["regret"], verdict["wrong"]["regret"]) > 2 * REGRET
