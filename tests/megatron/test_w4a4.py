"""W4A4 on Megatron: real layers against a naive model, then whole trainings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import Run, run_cases, train
from tests.megatron.w4a4_table import STEPS, TOKENS, WORLD

CASES = Path(__file__).with_name("w4a4_cases.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of w4a4_cases.py over two tensor-parallel processes."""
    return run_cases(CASES, tmp_path_factory.mktemp("w4a4"), WORLD)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_naive_one(cases: dict[str, Any], name: str) -> None:
    """Losses and every gradient of two micro-batches with a loss scale, the penalties in."""
    case = cases[f"step {name}"]
    assert case["losses"] <= 2e-6
    assert case["gradients"] <= 5e-6
    assert case["clips"] <= 2e-5
    assert case["missing"] == []
    assert case["reduced like weights"], "clips of experts belong to the experts' groups"
    if STEPS[name][0]["kurtosis_weight"]:
        assert case["from kurtosis"] >= 0.05, "this case could not tell whether a penalty is there"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("learned", 24),
        ("symmetric", 12),
        ("some layers", 12),
        ("kurtosis alone", 0),
        ("mxfp4", 0),
        ("experts", 60),
        ("experts over processes", 36),
    ],
)
def test_clips_are_where_they_were_asked_for(cases: dict[str, Any], name: str, count: int) -> None:
    assert cases[f"step {name}"]["clip count"] == count


def test_checkpoint_keys_are_those_of_stock_layers_and_clips(cases: dict[str, Any]) -> None:
    keys = cases["step learned"]["sharded keys"]
    clips = {key for key in keys if "input_quantizer" in key}
    layer = "decoder.layers"
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj")
    linears += ("mlp.linear_fc1", "mlp.linear_fc2")
    assert clips == {
        f"{layer}.{linear}.input_quantizer.clip_{side}"
        for linear in linears
        for side in ("high", "low")
    }
    assert {f"{layer}.{linear}.weight" for linear in linears} <= set(keys)


@pytest.mark.parametrize("name", TOKENS)
def test_scales_of_tokens_are_those_of_all_features(cases: dict[str, Any], name: str) -> None:
    """Each quantizer, bit for bit, on what all processes have of its input."""
    case = cases[f"quantizers {name}"]
    assert case["found"] > 10000
    assert case["wrong"] == 0
    assert case["gradients"]


@pytest.mark.parametrize("rounds", ["recomputed", "recomputed sequence parallel"])
def test_recompute_changes_no_bit(cases: dict[str, Any], rounds: str) -> None:
    """So a penalty counts once, whatever is recomputed."""
    assert len(cases[rounds]) == 5
    assert set(cases[rounds].values()) == {0}


def test_a_model_that_does_not_quantize_yet(cases: dict[str, Any]) -> None:
    """It is the model without; its clips have gradients of 0, and its quantizers look on."""
    case = cases["modes"]
    assert case["losses"] <= 2e-6
    assert case["gradients"] <= 5e-6
    assert case["clips"] == [24, 0.0]
    assert case["waiting"]
    assert case["observed"]


def test_half_precision(cases: dict[str, Any]) -> None:
    case = cases["bf16"]
    assert case["wrong"] == 0
    assert case["levels"] <= 16
    assert case["finite"]


SMALL = (
    *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights", "--init-method-std", 0.1),
    *("--group-query-attention", "--num-query-groups", 2),
)
W4A4 = (*SMALL, "--w4a4", "--w4a4-kurtosis-weight", 0.01, "--w4a4-clip-init")
VALUE, PERCENTILE = (*W4A4, 2), (*W4A4, "percentile:99")
SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
VPP = (
    *("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", 1),
)
ZERO1 = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model without W4A4."""
    folder = tmp_path_factory.mktemp("standard")
    train(*SMALL, "--exit-interval", 1, "--save", folder)
    return folder


@pytest.fixture(scope="module")
def straight(standard: Path) -> Run:
    return train(*VALUE, "--load", standard, "--finetune")


def kurtosis(run: Run) -> list[dict[str, float]]:
    """What the log says of each kind of projection, by iteration."""
    lines = [line for line in run.output.splitlines() if "lm loss:" in line]
    pattern = r"kurtosis (\w+): (\S+)"
    return [{name: float(value) for name, value in re.findall(pattern, line)} for line in lines]


def assert_same(run: Run, expected: Run, tolerance: float = 2e-5) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=tolerance)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=20 * tolerance)
    for found, wanted in zip(kurtosis(run), kurtosis(expected), strict=True):
        assert found == pytest.approx(wanted, rel=50 * tolerance)


def test_activity_line_and_log(straight: Run) -> None:
    line = "w4a4: 16 linear layers in 4 of 4 layers, inputs 4 bits (learned clips from 2), "
    assert line + "kurtosis 0.01" in straight.output.splitlines()
    found = kurtosis(straight)
    assert len(found) == 6
    for line in found:
        assert line.keys() == {"q", "k", "v", "o", "gate", "up", "down"}
        assert all(1 < value < 64 for value in line.values())


@pytest.mark.parametrize(
    ("flags", "processes"),
    [(SP, 2), (SP[:2], 2), (VPP, 2), ((*ZERO1, "--micro-batch-size", 2), 2)],
    ids=[
        "sequence parallel",
        "tensor parallel",
        "virtual pipeline, recompute",
        "sharded optimizer",
    ],
)
def test_one_model_whatever_the_layout(
    standard: Path, straight: Run, flags: tuple[object, ...], processes: int
) -> None:
    """Losses, norms of all gradients and kurtosis of six steps, clips trained."""
    run = train(*VALUE, "--load", standard, "--finetune", *flags, processes=processes)
    assert_same(run, straight)


def test_resume_is_exact(tmp_path: Path, standard: Path) -> None:
    """Calibrated in the first iteration, sharded over two processes, on which it goes on bit for
    bit; on one with twice the micro-batch up to rounding."""
    flags = (*PERCENTILE, *ZERO1, "--w4a4-clip-lr-mult", 5)
    saving = ("--save", tmp_path, "--save-interval", 3)
    whole = train(*flags, "--load", standard, "--finetune", *saving, processes=2)
    again = train(*flags, "--load", tmp_path, "--ckpt-step", 3, processes=2)
    assert again.losses[6] == whole.losses[6]
    assert again.grad_norms == {i: whole.grad_norms[i] for i in (4, 5, 6)}
    alone = train(*flags, "--load", tmp_path, "--ckpt-step", 3, "--micro-batch-size", 4)
    assert alone.losses[6] == pytest.approx(whole.losses[6], rel=2e-5)


def test_quantization_starts_when_it_is_told_to(standard: Path, straight: Run) -> None:
    """The first three iterations are those of a run that never quantizes."""
    loading = ("--load", standard, "--finetune")
    late = train(*VALUE, *loading, "--w4a4-start-iteration", 3)
    never = train(*VALUE, *loading, "--w4a4-activation-bits", 0)
    assert late.losses[3] == never.losses[3]
    assert late.losses[4] != never.losses[4]
    assert never.losses[1] != straight.losses[1]


def test_experts(tmp_path: Path) -> None:
    """Stock experts over two processes, as on one."""
    flags = (
        *(*VALUE, "--num-experts", 4, "--moe-router-topk", 2, "--moe-ffn-hidden-size", 48),
        *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"),
        *("--moe-shared-expert-intermediate-size", 32),
    )
    train(*flags, "--exit-interval", 1, "--save", tmp_path)
    loading = ("--load", tmp_path, "--finetune", "--exit-interval", 3)
    one = train(*flags, *loading)
    over = ("--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1)
    two = train(*flags, *loading, *SP, *over, processes=2)
    assert_same(two, one)
    assert "w4a4: 48 linear layers in 4 of 4 layers" in one.output


def test_what_a_checkpoint_without_clips_needs(standard: Path, tmp_path: Path) -> None:
    failed = train(*VALUE, "--load", standard, check=False)
    assert failed.returncode
    assert "has no clips (--w4a4)" in failed.output
    assert "add --finetune" in failed.output
    run = train(
        *VALUE, "--load", standard, "--no-load-optim", "--exit-interval", 2, "--save", tmp_path
    )
    assert 2 in run.losses
    failed = train(*SMALL, "--load", tmp_path, check=False)
    assert failed.returncode
    assert "its weights would compute another function" in failed.output


def test_clips_that_cross_are_an_error(standard: Path) -> None:
    flags = ("--w4a4-clip-lr-mult", 1e5, "--load", standard, "--finetune")
    failed = train(*VALUE, *flags, check=False)
    assert failed.returncode
    assert "its clips have crossed" in failed.output
    assert "--w4a4-clip-lr-mult" in failed.output
