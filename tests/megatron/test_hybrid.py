"""Ladder Residual on hybrid stacks: against the recurrence and GPT's ladder, then trainings."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_plugins import convert, hybrid
from megatron_plugins.ladder_residual import validate
from tests.megatron.harness import Run, known, run_cases, train, without
from tests.megatron.hybrid_table import AGAINST_GPT, AGAINST_RECURRENCE
from tests.megatron.ladder_table import WORLD
from torch_plugins.config import ConfigError, CrossLayerAttention, LadderResidual

CASES = Path(__file__).with_name("hybrid_cases.py")
TRAIN = Path(__file__).with_name("train_hybrid.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of hybrid_cases.py over two processes."""
    return run_cases(CASES, tmp_path_factory.mktemp("hybrid"), WORLD)


@pytest.mark.parametrize("name", AGAINST_RECURRENCE)
def test_logits_and_gradients_are_the_recurrences(cases: dict[str, Any], name: str) -> None:
    case = known(cases[name])
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["from standard"] >= 3e-3, "this case could not tell a ladder from the standard"
    assert case["same keys"]
    assert case["same sharded keys"]


@pytest.mark.parametrize("name", AGAINST_GPT)
def test_a_stack_is_the_same_function_as_a_gpt(cases: dict[str, Any], name: str) -> None:
    case = cases[f"gpt {name}"]
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["from standard"] >= 3e-3


@pytest.mark.parametrize("name", ["order", "order-sequence-parallel", "order-recompute-norm"])
def test_every_collective_is_where_a_gpt_has_it(cases: dict[str, Any], name: str) -> None:
    """Launches, waits and modules come in the order of a GPT's, forward and backward."""
    stack, gpt = cases[name]["stack"], cases[name]["gpt"]
    assert stack == gpt
    assert sum(event.startswith("launch") for event in gpt["forward"] + gpt["backward"]) >= 14


@pytest.mark.parametrize("name", ["late", "late-sequence-parallel"])
def test_a_buffer_in_flight_is_never_read(cases: dict[str, Any], name: str) -> None:
    """The buffers hold NaN until the wait, and NaN is not <= 0."""
    assert cases[name]["logits"] <= 0
    assert cases[name]["gradients"] <= 0


@pytest.mark.parametrize("layout", ["", "-recompute", "-sequence-parallel"])
def test_the_ladder_adds_no_collective(cases: dict[str, Any], layout: str) -> None:
    case = cases[f"collectives{layout}"]
    assert case["ladder"] == case["standard"]
    assert sum(case["ladder"].values()) > 16


def test_recompute_draws_the_same_dropout(cases: dict[str, Any]) -> None:
    case = cases["dropout"]
    assert case["logits"] == case["gradients"] == 0
    assert case["drops"] > 1e-2


def test_static_inference_equals_the_full_forward(cases: dict[str, Any]) -> None:
    assert cases["static-inference"]["logits"] <= 1e-6


def test_an_interrupted_forward_leaves_nothing(cases: dict[str, Any]) -> None:
    assert cases["interrupted"]["logits"] == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("feature", ["--dense-moe: not for hybrid models"]),
        ("mamba", ["layers 3 (M)", "--ladder-layers 1,2,5,6,7 can be"]),
        ("absent", ["layers G of the pattern have no local form"]),
        ("slot", ["no gdn_layer", "has a layer G"]),
        ("nothing", ["no ladder layer behind layer 0"]),
        ("number", ["num_layers of the configuration is 7", "number 8"]),
        ("schedule", ["TransformerLayer"]),  # of learning rates: layers are none of its business
        ("prediction", ["--ladder-residual: prediction layers"]),
    ],
)
def test_a_stack_refuses_what_it_cannot_be(
    cases: dict[str, Any], name: str, words: list[str]
) -> None:
    for word in words:
        assert word in cases["refused"][name]


@pytest.mark.parametrize(
    ("pattern", "layers", "words"),
    [
        ("M-M*-|M-", "all", "0 (M), 2 (M), 5 (M) .* 4 can be"),
        ("*G*G", "3", "3 (G) .* no two neighbours"),
        ("*-*-", "0", "no ladder layer behind layer 0"),
    ],
)
def test_patterns_are_checked_before_anything_is_built(
    pattern: str, layers: str, words: str
) -> None:
    args = Namespace(hybrid_layer_pattern=pattern, num_layers=len(pattern.replace("|", "")))
    expected = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ConfigError, match=expected):
        validate(args, LadderResidual(layers))


def test_a_ladder_beside_other_mixers_is_accepted() -> None:
    args = Namespace(hybrid_layer_pattern="M*-|*-M/*-/*-", num_layers=6)
    assert hybrid.pattern(args) == "M*-*-M"
    validate(args, LadderResidual("2-4"))


BIG = ("--init-method-std", 0.2)
LADDER = ("--ladder-residual", "--position-embedding-type", "rope")
SPEC = ("--spec", "megatron_plugins.hybrid_specs", "local_stack_spec")
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")


def train_hybrid(pattern: str, *flags: object, **options: Any) -> Run:
    flags = (*BIG, *LADDER, *SPEC, "--hybrid-layer-pattern", pattern, *flags)
    environment = {"PYTHONPATH": str(TRAIN.parents[2])}
    tiny = without("--num-layers")
    return train(*flags, tiny=tiny, script=TRAIN, environment=environment, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Six iterations, with checkpoints after three and after six."""
    folder = tmp_path_factory.mktemp("straight")
    return train_hybrid("*-*-*-*-", "--save", folder, "--save-interval", 3), folder


def test_a_stack_trains_as_a_gpt(straight: tuple[Run, Path]) -> None:
    """From the same seed, both start with the same weights."""
    run, _ = straight
    gpt = train(*BIG, *LADDER)
    assert "ladder-residual: 8 of 8 layers" in run.output
    assert run.losses == pytest.approx(gpt.losses, rel=1e-6)
    assert run.grad_norms == pytest.approx(gpt.grad_norms, rel=1e-5)


def test_conversion_and_export_refuse_its_checkpoints(
    straight: tuple[Run, Path], tmp_path: Path
) -> None:
    _, folder = straight
    with pytest.raises(ConfigError, match=r"hybrid model's .* only those of GPT models"):
        convert.share(folder, tmp_path / "shared", CrossLayerAttention(2), "mean")
    with pytest.raises(ConfigError, match="--hybrid-layer-pattern"):
        convert.export(folder, tmp_path / "exported", None, None)


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [
        ("*-*-*-*-", (*TP2, "--sequence-parallel")),
        ("*-*-*|-*-", PP2),
        ("*|-*-|*-|*-", (*PP2, *FULL, "--recompute-num-layers", 2)),
    ],
    ids=["sequence parallel", "pp2", "virtual pp, recompute"],
)
def test_resumes_in_other_layouts(
    straight: tuple[Run, Path], pattern: str, flags: tuple[Any, ...]
) -> None:
    run, folder = straight
    resumed = train_hybrid(pattern, "--load", folder, "--ckpt-step", 3, *flags, processes=2)
    assert set(resumed.losses) == {4, 5, 6}
    # Megatron keeps the resumed iteration's loss in its first average: see the third.
    assert resumed.losses[6] == pytest.approx(run.losses[6], rel=2e-5)
    for iteration in (4, 5, 6):
        norm = run.grad_norms[iteration]
        assert resumed.grad_norms[iteration] == pytest.approx(norm, rel=4e-4)
