"""Ladder Residual on Megatron: the layers against the recurrence, then whole trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import Run, known, run_cases, train
from tests.megatron.ladder_order import (
    assert_gradients_are_hidden,
    assert_modules_begin_under_the_one_before,
)
from tests.megatron.ladder_table import AGAINST_RECURRENCE, WORLD

CASES = Path(__file__).with_name("ladder_cases.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of ladder_cases.py over two tensor-parallel processes."""
    return run_cases(CASES, tmp_path_factory.mktemp("ladder"), WORLD)


@pytest.mark.parametrize("name", AGAINST_RECURRENCE)
def test_logits_and_gradients_are_the_recurrences(cases: dict[str, Any], name: str) -> None:
    case = known(cases[name])
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["from standard"] >= 5e-3, "this case could not tell a ladder from the standard"


@pytest.mark.parametrize("name", AGAINST_RECURRENCE)
def test_state_dict_keys_stay_stock(cases: dict[str, Any], name: str) -> None:
    case = known(cases[name])
    assert case["same keys"]
    assert case["same sharded keys"]


@pytest.mark.parametrize("name", ["dropout", "dropout-sequence-parallel"])
def test_recompute_draws_the_same_dropout(cases: dict[str, Any], name: str) -> None:
    assert cases[name]["logits"] == 0
    assert cases[name]["gradients"] == 0
    assert cases[name]["drops"] > 1e-2


def test_fused_bias_dropout_add_equals_the_unfused(cases: dict[str, Any]) -> None:
    assert cases["fused"]["logits"] <= 1e-6
    assert cases["fused"]["gradients"] <= 2e-6


@pytest.mark.parametrize("name", ["late", "late-sequence-parallel", "late-recompute"])
def test_a_buffer_in_flight_is_never_read(cases: dict[str, Any], name: str) -> None:
    """The buffers hold NaN until the wait, and NaN is not <= 0."""
    assert cases[name]["logits"] <= 0
    assert cases[name]["gradients"] <= 0


@pytest.mark.parametrize(
    ("name", "phase"),
    [("order", "forward"), ("static-order", "prefill"), ("static-order", "decode")],
)
def test_every_reduction_overlaps_the_next_module(
    cases: dict[str, Any], name: str, phase: str
) -> None:
    """Reduction n is launched before module n + 1 starts, and waited for after it ran."""
    events = cases[name][phase]
    launches = [event for event in events if event.startswith("launch")]
    # the eighth module's is its linear's own
    assert launches == [f"launch output {n}" for n in range(7)]
    for n in range(7):
        launched, waited = events.index(f"launch output {n}"), events.index(f"wait output {n}")
        assert launched < events.index(f"start {n + 1}") < waited
        if n < 6:
            assert waited > events.index(f"launch output {n + 1}")


@pytest.mark.parametrize(("name", "first"), [("order", 1), ("order-partial", 4)])
def test_every_gradients_reduction_overlaps_the_module_before(
    cases: dict[str, Any], name: str, first: int
) -> None:
    assert_gradients_are_hidden(cases[name]["backward"], first)


def test_a_sequence_parallel_module_begins_under_the_one_before(cases: dict[str, Any]) -> None:
    case = cases["order-sequence-parallel"]
    assert_modules_begin_under_the_one_before(case["forward"], case["backward"])


def test_a_norm_that_is_recomputed_does_not_begin_early(cases: dict[str, Any]) -> None:
    """It would be kept, which recomputing it is to avoid."""
    events = cases["order-recompute-norm"]["forward"]
    for n in range(8):
        assert events.index(f"wait its input {n}") == events.index(f"launch its input {n}") + 1


@pytest.mark.parametrize("recompute", ["", "-recompute"])
@pytest.mark.parametrize("layout", ["", "-sequence-parallel"])
def test_the_ladder_adds_no_collective(cases: dict[str, Any], recompute: str, layout: str) -> None:
    case = cases[f"collectives{recompute}{layout}"]
    assert case["ladder"] == case["standard"]
    assert sum(case["ladder"].values()) > 16


@pytest.mark.parametrize("name", ["static-inference", "static-inference-llama"])
def test_static_inference_equals_the_full_forward(cases: dict[str, Any], name: str) -> None:
    assert cases[name]["logits"] <= 1e-6


LADDER = ("--ladder-residual",)
PARTIAL = ("--ladder-residual", "--ladder-layers", "1-2")
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)
SP = (*TP2, "--sequence-parallel")
FULL = [
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
]
BIG = ("--init-method-std", 0.2)  # weights large enough for the residual's order to show


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standard checkpoint, from which every run below starts."""
    folder = tmp_path_factory.mktemp("standard")
    train(*BIG, "--save", folder, "--exit-interval", 1)
    return folder


@pytest.fixture(scope="module")
def ladder(standard: Path) -> Run:
    return train(*BIG, "--load", standard, "--finetune", *LADDER)


@pytest.fixture(scope="module")
def partial(standard: Path) -> Run:
    return train(*BIG, "--load", standard, "--finetune", *PARTIAL)


def assert_same(run: Run, expected: Run, tolerance: float = 2e-5) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=tolerance)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=20 * tolerance)


def test_a_standard_checkpoint_loads_and_is_another_function(standard: Path, ladder: Run) -> None:
    stock = train(*BIG, "--load", standard, "--finetune")
    assert abs(stock.losses[1] - ladder.losses[1]) > 1e-3
    assert "ladder-residual: 4 of 4 layers" in ladder.output
    assert "another function" in ladder.output
    assert "another function" not in stock.output


@pytest.mark.parametrize(
    "flags", [TP2, SP, PP2, VPP], ids=["tp2", "sequence parallel", "pp2", "virtual pp"]
)
def test_parallel_layouts_train_alike(standard: Path, ladder: Run, flags: tuple[Any, ...]) -> None:
    run = train(*BIG, "--load", standard, "--finetune", *LADDER, *flags, processes=2)
    assert_same(run, ladder)


def test_a_partial_ladder_across_pipeline_stages_with_recompute(
    standard: Path, partial: Run, ladder: Run
) -> None:
    run = train(*BIG, "--load", standard, "--finetune", *PARTIAL, *VPP, *FULL, processes=2)
    assert_same(run, partial)
    assert abs(partial.losses[1] - ladder.losses[1]) > 1e-3


def test_recompute_changes_nothing(standard: Path, ladder: Run) -> None:
    run = train(*BIG, "--load", standard, "--finetune", *LADDER, *FULL)
    assert run.losses == ladder.losses
    assert run.grad_norms == ladder.grad_norms


def test_data_parallel_with_distributed_optimizer(standard: Path, ladder: Run) -> None:
    flags = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    run = train(*BIG, "--load", standard, "--finetune", *LADDER, *flags, processes=2)
    assert_same(run, ladder)


@pytest.mark.parametrize("tensor", [TP2, SP], ids=["tp2", "sequence parallel"])
def test_both_with_accumulation(standard: Path, ladder: Run, tensor: tuple[Any, ...]) -> None:
    """Two microbatches a step, the first under ``no_sync``, on two tensor and two data ranks."""
    flags = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    start = (*BIG, "--load", standard, "--finetune", *LADDER)
    assert_same(train(*start, *tensor, *flags, processes=4), ladder)


def test_resume_equals_the_straight_run(standard: Path, tmp_path: Path, ladder: Run) -> None:
    """Saved by two tensor-parallel ranks, resumed by two pipeline stages."""
    start = ("--load", standard, "--finetune")
    train(*BIG, *start, *LADDER, *TP2, "--save", tmp_path, "--exit-interval", 3, processes=2)
    resumed = train(*BIG, "--load", tmp_path, *LADDER, *PP2, processes=2)
    assert set(resumed.losses) == {4, 5, 6}
    # Megatron keeps the resumed iteration's loss in its first average: see the third.
    assert resumed.losses[6] == pytest.approx(ladder.losses[6], rel=2e-5)
    for iteration in (4, 5, 6):
        norm = ladder.grad_norms[iteration]
        assert resumed.grad_norms[iteration] == pytest.approx(norm, rel=4e-4)


def test_moe_layers(tmp_path: Path) -> None:
    """Experts on two expert-parallel, tensor-parallel ranks train as on one, and bf16 follows."""
    moe = ("--num-experts", 4, "--moe-router-topk", 2, "--moe-token-dispatcher-type", "alltoall")
    moe += ("--disable-bias-linear", *BIG)
    train(*moe, "--save", tmp_path, "--exit-interval", 1)
    start = (*moe, "--load", tmp_path, "--finetune", *LADDER)
    one = train(*start)
    parallel = (*SP, "--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1)
    assert_same(train(*start, *parallel, processes=2), one)
    half = train(*start, *parallel, "--bf16", processes=2)
    assert half.losses[1] == pytest.approx(one.losses[1], rel=5e-3)


def test_the_spec_door(standard: Path, ladder: Run) -> None:
    run = train(
        *BIG,
        "--load",
        standard,
        "--finetune",
        "--spec",
        "megatron_plugins.specs",
        "ladder_gpt_layer_spec",
    )
    assert run.losses == ladder.losses
