"""Desync Residual on Megatron: the layers against the naive reference, then whole trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.desync_table import CASES, FOUR
from tests.megatron.harness import Run, run_cases, train

SCRIPT = Path(__file__).with_name("desync_cases.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Any]]]:
    """Results of desync_cases.py, by the number of tensor-parallel processes."""
    return {size: run_cases(SCRIPT, tmp_path_factory.mktemp("desync"), size) for size in (2, 4)}


@pytest.mark.parametrize(
    ("size", "name"), [(2, name) for name in CASES] + [(4, name) for name in FOUR]
)
def test_logits_and_gradients_are_the_references(cases: Any, size: int, name: str) -> None:
    case = cases[size][name]
    assert case["logits"] <= 1e-12
    assert case["gradients"] <= 1e-12, case["worst"]
    assert case["other pattern"] >= 0.05, "this case could not tell one pattern from another"


@pytest.mark.parametrize(("pattern", "regions"), [("2x", 4), ("4x", 2), ("last", 1)])
def test_only_the_ends_of_regions_communicate(cases: Any, pattern: str, regions: int) -> None:
    """Forward and backward once each for a region, beside embedding and head; a standard layer has
    two, and the gather of a weight's gradient under sequence parallelism."""
    standard, found = (cases[2][f"collectives-{name}"] for name in (None, pattern))
    assert standard == {"forward": 8 + 1, "backward": 8 + 1}
    assert found == {"forward": regions + 1, "backward": regions + 1}
    standard, found = (
        cases[2][f"collectives-{name}-sequence-parallel"] for name in (None, pattern)
    )
    assert standard == {"forward": 16 + 2, "backward": 3 * 8 + 3}
    assert found == {"forward": 2 * regions + 2, "backward": 2 * regions + 3}


def test_recompute_draws_the_same_dropout(cases: Any) -> None:
    assert cases[2]["recomputed"]["logits"] == 0
    assert cases[2]["recomputed"]["gradients"] == 0
    assert cases[2]["recomputed"]["drops"] > 1e-2


def test_static_inference_equals_the_full_forward(cases: Any) -> None:
    assert cases[2]["static-inference"]["logits"] <= 1e-6


TP2 = ("--tensor-model-parallel-size", 2)
SP = (*TP2, "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", 2)
DESYNC = ("--desync-residual", "--desync-pattern", "last")
MODEL = ("--init-method-std", 0.2, "--disable-bias-linear", "--normalization", "RMSNorm")
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three iterations, in which the norms of the ranks have parted."""
    folder = tmp_path_factory.mktemp("begun")
    run = train(*MODEL, *DESYNC, *TP2, "--save", folder, "--exit-interval", 3, processes=2)
    assert "desync-residual: 1 of 8 modules reduce, 2 streams" in run.output
    return folder


@pytest.fixture(scope="module")
def straight() -> Run:
    return train(*MODEL, *DESYNC, *TP2, processes=2)


@pytest.mark.parametrize(
    ("flags", "processes"),
    [(SP, 2), ((*TP2, *PP2), 4), ((*SP, *PP2), 4), ((*TP2, *SHARDED), 4)],
    ids=["sequence parallel", "pp2", "sequence parallel, pp2", "dp2"],
)
def test_resume_in_another_layout_equals_the_straight_run(
    begun: Path, straight: Run, flags: tuple[Any, ...], processes: int
) -> None:
    """The region lies across the pipeline stages."""
    more = ("--no-load-optim",) if "--use-distributed-optimizer" in flags else ()
    run = train(*MODEL, *DESYNC, "--load", begun, *flags, *more, processes=processes)
    assert set(run.losses) == {4, 5, 6}
    norm = run.grad_norms[4]
    assert norm == pytest.approx(straight.grad_norms[4], rel=4e-4)
    if not more:
        # Megatron keeps the resumed iteration's loss in its first average: see the third.
        assert run.losses[6] == pytest.approx(straight.losses[6], rel=2e-5)
        assert run.grad_norms[6] == pytest.approx(straight.grad_norms[6], rel=4e-4)


def test_a_checkpoint_belongs_to_its_tensor_parallel_size(begun: Path) -> None:
    four = ("--tensor-model-parallel-size", 4)
    run = train(*MODEL, *DESYNC, "--load", begun, *four, processes=4, check=False)
    assert run.returncode
    assert (
        "has --desync-residual --desync-pattern last --desync-ranks 2, this run --desync-residual "
        "--desync-pattern last --desync-ranks 4: it has other tensors"
    ) in run.output


def test_checkpoint_arguments_turn_it_on(begun: Path, straight: Run) -> None:
    run = train(*MODEL, "--load", begun, "--use-checkpoint-args", *TP2, processes=2)
    assert "Setting --desync-residual --desync-pattern last --desync-ranks 2" in run.output
    assert run.losses[6] == pytest.approx(straight.losses[6], rel=2e-5)
