"""Cross-Layer Attention on Megatron: the layers against the recurrence, then whole trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.cla_table import (
    AGAINST_RECURRENCE,
    RECOMPUTED,
    STATIC_INFERENCE,
)
from tests.megatron.harness import Run, launch, train
from tests.megatron.ladder_table import BATCH, GPT, HIDDEN, LAYERS, SEQUENCE, WORLD

CASES = Path(__file__).with_name("cla_cases.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of cla_cases.py over two tensor-parallel processes."""
    output = tmp_path_factory.mktemp("cla") / "cases.jsonl"
    environment = {
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": str(CASES.parents[2]),
    }
    launch(CASES, output, processes=WORLD, environment=environment, timeout=400)
    return {line.pop("case"): line for line in map(json.loads, output.read_text().splitlines())}


@pytest.mark.parametrize("name", AGAINST_RECURRENCE)
def test_logits_and_gradients_are_the_recurrences(cases: dict[str, Any], name: str) -> None:
    assert cases[name]["logits"] <= 1e-6
    assert cases[name]["gradients"] <= 2e-6
    assert cases[name]["from standard"] >= 1e-2, "this case could not tell sharing from standard"


@pytest.mark.parametrize("name", AGAINST_RECURRENCE)
def test_consumers_have_no_keys_and_values(cases: dict[str, Any], name: str) -> None:
    """Not zeroed, not frozen: absent, in the model and in its checkpoint."""
    feature = AGAINST_RECURRENCE[name][0]
    producers = feature.resolve(LAYERS)
    separate = feature.kv_norm == "separate"
    consumers = [layer for layer, producer in enumerate(producers) if layer != producer]
    assert cases[name]["queries only"] == [
        separate or layer in consumers for layer in range(LAYERS)
    ]
    assert cases[name]["unused"] == []
    keys = cases[name]["sharded keys"]
    layers = {key: [f"decoder.layers.{i}.self_attention" in key for i in consumers] for key in keys}
    of_consumers = [key for key, hits in layers.items() if any(hits)]
    assert len(of_consumers) >= 2 * len(consumers)
    assert not [key for key in of_consumers if "linear_kv" in key or "k_layernorm" in key]
    own = [key for key in keys if key.endswith("linear_kv.layer_norm_weight")]
    assert len(own) == (len(set(producers)) if separate else 0)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recompute_changes_no_bit(cases: dict[str, Any], name: str) -> None:
    """Chunks end inside groups, dropout is on. Recomputing norms adds the gradients of the stream
    in another order, in a standard model too."""
    case = cases[f"recomputed {name}"]
    assert len(case["differences"]) >= 8
    for recompute, difference in case["differences"].items():
        assert difference <= (2e-6 if recompute.startswith("norm") else 0), recompute
    assert case["drops"] > 1e-2


def test_groups_of_one_layer_are_the_standard_model(cases: dict[str, Any]) -> None:
    assert cases["factor one"]["equal"]
    assert cases["factor one"]["same modules"]


@pytest.mark.parametrize("name", STATIC_INFERENCE)
def test_static_inference_equals_the_full_forward(cases: dict[str, Any], name: str) -> None:
    case = cases[f"static inference {name}"]
    assert case["logits"] <= 1e-6


@pytest.mark.parametrize("name", STATIC_INFERENCE)
def test_static_caches_are_those_of_producers(cases: dict[str, Any], name: str) -> None:
    """2 * producers * heads * head size * 4 bytes per token, in all processes together."""
    feature, _, options = AGAINST_RECURRENCE[name]
    producers = sorted(set(feature.resolve(LAYERS)))
    case = cases[f"static inference {name}"]
    assert case["layers"] == [producer + 1 for producer in producers]
    heads = max({**GPT, **options}["num_query_groups"], WORLD)  # a rank has one head at least
    head_size = HIDDEN // GPT["num_attention_heads"]
    per_token = 2 * len(producers) * heads * head_size * 4
    assert case["bytes"] * WORLD == per_token * BATCH * SEQUENCE


CLA = ("--cla-sharing-factor", 2)
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
SP = (*TP2, "--sequence-parallel")
LLAMA = (
    "--swiglu",
    "--normalization",
    "RMSNorm",
    "--position-embedding-type",
    "rope",
    "--disable-bias-linear",
    "--untie-embeddings-and-output-weights",
)
BIG = ("--init-method-std", 0.2)  # weights large enough for sharing to show
MQA = (*LLAMA, *BIG, "--group-query-attention", "--num-query-groups", 1)


def assert_same(run: Run, expected: Run, tolerance: float = 2e-5) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=tolerance)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=20 * tolerance)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the ladder and a separate norm, from which every run below starts."""
    folder = tmp_path_factory.mktemp("cla")
    train(*MQA, *CLA, "--save", folder, "--exit-interval", 1)
    return folder


@pytest.fixture(scope="module")
def straight(saved: Path) -> Run:
    return train(*MQA, *CLA, "--load", saved, "--finetune")


def test_activity_line(straight: Run) -> None:
    line = "cross-layer-attention: 2 of 4 layers share keys and values (producers 0, 2)"
    assert line in straight.output.splitlines()
