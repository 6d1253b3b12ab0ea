"""Cross-Layer Attention on Megatron: the layers against the recurrence, then whole trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.cla_table import (
    AGAINST_RECURRENCE,
    DYNAMIC_INFERENCE,
    RECOMPUTED,
    STATIC_INFERENCE,
)
from tests.megatron.harness import Run, run_cases, train
from tests.megatron.ladder_table import BATCH, GPT, HIDDEN, LAYERS, SEQUENCE, WORLD

CASES = Path(__file__).with_name("cla_inference.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of cla_cases.py and cla_inference.py over two tensor-parallel processes."""
    return run_cases(CASES, tmp_path_factory.mktemp("cla"), WORLD)


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


def bytes_per_token(name: str) -> int:
    """2 (keys and values) * producers * heads * head size * 4, of all processes together."""
    feature, _, options = AGAINST_RECURRENCE[name]
    heads = max({**GPT, **options}["num_query_groups"], WORLD)  # a rank has one head at least
    head_size = HIDDEN // GPT["num_attention_heads"]
    return 2 * len(set(feature.resolve(LAYERS))) * heads * head_size * 4


@pytest.mark.parametrize("name", STATIC_INFERENCE)
def test_static_caches_are_those_of_producers(cases: dict[str, Any], name: str) -> None:
    case = cases[f"static inference {name}"]
    producers = sorted(set(AGAINST_RECURRENCE[name][0].resolve(LAYERS)))
    assert case["layers"] == [producer + 1 for producer in producers]
    assert case["bytes"] * WORLD == bytes_per_token(name) * BATCH * SEQUENCE


@pytest.mark.parametrize("name", ["standard", *DYNAMIC_INFERENCE])
def test_dynamic_inference_equals_the_full_forward(cases: dict[str, Any], name: str) -> None:
    case = cases[f"dynamic inference {name}"]
    assert case["logits"] <= 1e-6
    assert case["steps"] == 8


@pytest.mark.parametrize("name", DYNAMIC_INFERENCE)
def test_dynamic_caches_are_those_of_producers(cases: dict[str, Any], name: str) -> None:
    """So as many more blocks of tokens fit into the same buffer."""
    case, standard = cases[f"dynamic inference {name}"], cases["dynamic inference standard"]
    assert case["bytes per token"] * WORLD == bytes_per_token(name)
    producers = len(set(AGAINST_RECURRENCE[name][0].resolve(LAYERS)))
    assert case["block bytes"] * LAYERS == standard["block bytes"] * producers
    assert case["blocks"] * producers == standard["blocks"] * LAYERS


def test_packed_sequences_are_as_each_alone(cases: dict[str, Any]) -> None:
    assert cases["packed"]["logits"] <= 1e-6


def test_the_static_engine_does_not_fall_back_in_silence(cases: dict[str, Any]) -> None:
    assert "Error initializing dynamic engine" in cases["standard fallback"]["warned"]
    assert "Error initializing dynamic engine" in cases["fallback"]["raised"]


def test_fused_rotation_of_queries_and_keys_is_refused(cases: dict[str, Any]) -> None:
    assert "use_flashinfer_fused_rope" in cases["fused rope"]["error"]


MQA = (
    *("--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--group-query-attention", "--num-query-groups", 1),
    *("--num-layers", 8, "--init-method-std", 0.2),  # large enough for sharing to show
)
CLA = (*MQA, "--cla-sharing-factor", 2)
ALL = (*MQA, "--cla-pattern", "0,1,1,1,4,4,6,6", "--cla-kv-norm", "separate", "--ladder-residual")
"""Uneven groups, a norm of their own, and the ladder."""
SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", 2)
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", 2)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
ONE = (*FULL, "--recompute-num-layers", 1)
ZERO1 = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")


@dataclass
class Trained:
    """Six iterations, and where the third was saved."""

    run: Run
    folder: Path
    flags: tuple[object, ...]

    def resumed(self, *flags: object, processes: int = 1) -> Run:
        return train(
            *self.flags, "--load", self.folder, "--ckpt-step", 3, *flags, processes=processes
        )


def trained(folder: Path, *flags: object, parallel: tuple[object, ...] = ()) -> Trained:
    processes = 2 if parallel else 1
    saving = ("--save", folder, "--save-interval", 3)
    return Trained(train(*flags, *saving, *parallel, processes=processes), folder, flags)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("shared"), *CLA)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """By two data-parallel ranks, which share the optimizer."""
    return trained(tmp_path_factory.mktemp("everything"), *ALL, *ZERO1, parallel=OVERLAP)


def assert_continues(resumed: Run, expected: Run, tolerance: float = 2e-5) -> None:
    """Iterations 4 to 6 are those of the straight run. Megatron keeps the loss of a resumed
    iteration in its first average: the third is compared."""
    assert set(resumed.losses) == {4, 5, 6}
    assert resumed.losses[6] == pytest.approx(expected.losses[6], rel=tolerance)
    norms = {iteration: expected.grad_norms[iteration] for iteration in (4, 5, 6)}
    assert resumed.grad_norms == pytest.approx(norms, rel=20 * tolerance)


def test_activity_line(shared: Trained, everything: Trained) -> None:
    lines = shared.run.output.splitlines() + everything.run.output.splitlines()
    prefix = "cross-layer-attention: 4 of 8 layers share keys and values (producers"
    assert f"{prefix} 0, 2, 4, 6)" in lines
    assert f"{prefix} 0, 1, 4, 6), kv norm of their own" in lines
    assert "ladder-residual: 8 of 8 layers" in lines


def test_resume_is_exact(shared: Trained) -> None:
    assert_continues(shared.resumed(), shared.run, tolerance=0)


@pytest.mark.parametrize(
    "flags", [SP, (*VPP, *ONE)], ids=["sequence parallel", "virtual pipeline, recompute"]
)
def test_parallel_layouts_continue_from_one_checkpoint(
    shared: Trained, flags: tuple[object, ...]
) -> None:
    """One head of keys and values on two ranks, resharded; stages of one group each."""
    assert_continues(shared.resumed(*flags, processes=2), shared.run)


def test_with_the_ladder_and_a_norm_of_their_own(everything: Trained) -> None:
    """Begun by two data-parallel ranks, continued by two pipeline stages, with recompute."""
    assert_continues(everything.resumed(*PP2, *ONE, processes=2), everything.run)
