"""DS-MoE on Megatron: the layers against sums over experts written out, then whole trainings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.dense_moe_table import INFERENCE, STEPS, WORLD
from tests.megatron.harness import Run, run_cases, train

CASES = Path(__file__).with_name("dense_moe_cases.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of dense_moe_cases.py over two tensor-parallel processes."""
    return run_cases(CASES, tmp_path_factory.mktemp("dense_moe"), WORLD)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_sum_over_experts(cases: dict[str, Any], name: str) -> None:
    """Losses and every gradient of two micro-batches with a loss scale, the routers' losses in."""
    case = cases[f"step {name}"]
    assert case["losses"] <= 2e-6
    assert case["gradients"] <= 5e-6
    if "no loss" not in name:
        assert case["from losses"] >= 0.1, "this case could not tell whether a loss is there"
    assert case["unused"] == []


def test_a_weight_of_zero_is_no_loss(cases: dict[str, Any]) -> None:
    assert cases["step no loss"]["from losses"] == 0


def test_checkpoint_keys_are_those_of_stock_moe_layers(cases: dict[str, Any]) -> None:
    keys = cases["step gated"]["sharded keys"]
    for name in ("router.weight", "experts.experts.linear_fc1.weight"):
        assert f"decoder.layers.mlp.{name}" in keys
    assert "decoder.layers.mlp.linear_fc1.weight" not in keys


@pytest.mark.parametrize("rounds", ["recomputed", "recomputed sequence parallel"])
def test_recompute_changes_no_bit(cases: dict[str, Any], rounds: str) -> None:
    """So a loss counts once, whatever is recomputed."""
    assert len(cases[rounds]) == 5
    assert set(cases[rounds].values()) == {0}


@pytest.mark.parametrize("name", INFERENCE)
def test_inference_keeps_what_the_rules_keep(cases: dict[str, Any], name: str) -> None:
    """In evaluation, and from prompt to last token through the caches of a static context."""
    case = cases[f"inference {name}"]
    packed = [case.pop(key) for key in ("packed", "packed, sequence parallel") if key in case]
    assert len(packed) == 2 * ("inference" in INFERENCE[name][0])
    for from_rounded, rounding in packed:  # eight bits of inputs against four bits of weights
        assert 0 < from_rounded < rounding / 4
    assert case["evaluation"] <= 3e-6
    assert case["evaluation, sequence parallel"] <= 3e-6
    assert case["cached"] <= 3e-6
    if name != "dense":
        assert case["from dense"] >= 0.1, "this rule drops nothing that matters"
    projected, attended = case["left out"]
    if "attention_inference" not in INFERENCE[name][0] or "kernel" in name:
        assert projected == attended == 0
    else:
        assert attended >= 0.2
        assert (projected >= 0.1) == (name != "heads shared by processes")


def test_a_process_without_a_kept_expert_and_one_token(cases: dict[str, Any]) -> None:
    assert max(cases["extremes"].values()) <= 3e-6


def test_half_precision(cases: dict[str, Any]) -> None:
    assert cases["bf16"]["finite"]
    assert cases["bf16"]["losses"] <= 0.05


@pytest.mark.parametrize("kind", ["gated", "gelu"])
@pytest.mark.parametrize("split", ["4 of 4, over 1", "4 of 4, over 2", "2 of 4, over 2"])
def test_a_stock_moe_layer_loads_the_checkpoint(
    cases: dict[str, Any], kind: str, split: str
) -> None:
    """With softmax before its top-k it is our rule; its experts over one process or two."""
    case = cases[f"stock {kind}, {split}"]
    assert case["logits"] <= 3e-6
    if split.startswith("2"):
        assert case["from dense"] >= 0.1


SMALL = (
    *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--num-layers", 4),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights", "--init-method-std", 0.2),
)
EXPERTS = (
    *("--dsmoe-num-experts", 8, "--dsmoe-ffn-hidden-size", 16, "--dsmoe-router-hidden-size", 32),
    *("--dsmoe-attention-experts", 2, "--dsmoe-mi-weight-mlp", 0.1),
    *("--dsmoe-mi-weight-attention", 0.1),
)
DENSE_MOE = (*SMALL, *EXPERTS)
EVERYTHING = (
    *(*SMALL, "--dsmoe-num-experts", 4, "--dsmoe-ffn-hidden-size", 24, "--dsmoe-gated"),
    *("--dsmoe-router", "linear", "--dsmoe-mi-weight-mlp", 10, "--cla-sharing-factor", 2),
    *("--ladder-residual", "--dsmoe-mi-reduction", "data-parallel"),
)
"""SwiGLU experts, the mean over all data-parallel processes, shared keys and a ladder."""
SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", 2)
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
ONE = (*FULL, "--recompute-num-layers", 1)
ZERO1 = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


@dataclass
class Trained:
    """Six iterations, and where the third was saved."""

    run: Run
    folder: Path
    flags: tuple[object, ...]

    def resumed(self, *flags: object, processes: int = 1, check: bool = True) -> Run:
        return train(
            *(*self.flags, "--load", self.folder, "--ckpt-step", 3, *flags),
            processes=processes,
            check=check,
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    return Trained(train(*DENSE_MOE, "--save", folder, "--save-interval", 3), folder, DENSE_MOE)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """By two data-parallel processes, which share the optimizer, two micro-batches each."""
    folder = tmp_path_factory.mktemp("everything")
    flags = (*EVERYTHING, *ZERO1)
    run = train(*flags, "--save", folder, "--save-interval", 3, processes=2)
    return Trained(run, folder, flags)


def assert_continues(resumed: Run, expected: Run, tolerance: float = 2e-5) -> None:
    """Iterations 4 to 6 are those of the straight run. Megatron keeps the loss of a resumed
    iteration in its first average: the third is compared."""
    assert set(resumed.losses) == {4, 5, 6}
    assert resumed.losses[6] == pytest.approx(expected.losses[6], rel=tolerance)
    norms = {iteration: expected.grad_norms[iteration] for iteration in (4, 5, 6)}
    assert resumed.grad_norms == pytest.approx(norms, rel=20 * tolerance)


def test_activity_line(trained: Trained, everything: Trained) -> None:
    lines = trained.run.output.splitlines() + everything.run.output.splitlines()
    start = "dense-moe: 4 of 4 layers"
    both = "8 experts of width 16, 2 attention experts of 2 heads, mlp routers"
    assert f"{start}, {both}" in lines
    assert f"{start}, 4 SwiGLU experts of width 24, linear routers" in lines


def statistics(run: Run) -> list[dict[str, float]]:
    """What the log says of the routers, by iteration."""
    lines = [line for line in run.output.splitlines() if "lm loss:" in line]
    pattern = r"((?:mi|entropy|active) (?:mlp|attention)): (\S+)"
    return [{name: float(value) for name, value in re.findall(pattern, line)} for line in lines]


def test_the_log_tells_of_the_routers(trained: Trained) -> None:
    """Mutual information and entropy make up the entropy of the mean, log N at most."""
    found = statistics(trained.run)
    assert len(found) == 6
    for line in found:
        for kind, most in (("mlp", 2.0794), ("attention", 0.6931)):
            assert 0 < line[f"mi {kind}"] < most
            assert line[f"mi {kind}"] + line[f"entropy {kind}"] <= most + 1e-3
            assert 0 < line[f"active {kind}"] <= 1


def test_resume_is_exact(trained: Trained) -> None:
    assert_continues(trained.resumed(), trained.run, tolerance=0)


@pytest.mark.parametrize(
    "flags", [SP, (*VPP, *ONE)], ids=["sequence parallel", "virtual pipeline, recompute"]
)
def test_parallel_layouts_continue_from_one_checkpoint(
    trained: Trained, flags: tuple[object, ...]
) -> None:
    resumed = trained.resumed(*flags, processes=2)
    assert_continues(resumed, trained.run)
    assert statistics(resumed)[-1] == pytest.approx(statistics(trained.run)[-1], rel=1e-3)


def test_with_ladder_and_shared_keys_on_two_processes(everything: Trained) -> None:
    """Begun by two data-parallel processes with a sharded optimizer, continued by one with
    micro-batches of their union, whose mean of scores is the same: by both, with recompute."""
    resumed = everything.resumed("--micro-batch-size", 4, *ONE)
    assert_continues(resumed, everything.run)


def test_the_mean_of_one_process_is_another_loss(everything: Trained) -> None:
    """The control of the test above."""
    resumed = everything.resumed("--dsmoe-mi-reduction", "local", processes=2)
    norms = [everything.run.grad_norms[4], resumed.grad_norms[4]]
    assert norms[1] != pytest.approx(norms[0], rel=1e-3)


def test_evaluation_may_keep_fewer_experts(trained: Trained) -> None:
    """The loss of validation differs, that of training does not."""
    flags = ("--eval-interval", 2, "--eval-iters", 1, "--split", "90,10,0")
    found = [
        trained.resumed(*flags, *more)
        for more in ((), ("--dsmoe-inference", "top-k", "--dsmoe-top-k", 1))
    ]
    losses = [re.findall(r"validation loss at.*lm loss value: (\S+)", run.output) for run in found]
    assert len(losses[0]) == len(losses[1]) >= 1
    assert losses[0] != losses[1]
    assert found[0].losses == found[1].losses


GATED = (
    *(*SMALL, "--dsmoe-num-experts", 4, "--dsmoe-ffn-hidden-size", 24, "--dsmoe-gated"),
    *("--dsmoe-router", "linear", "--exit-interval", 1),
)
STOCK = (
    *(*SMALL, "--num-experts", 4, "--moe-ffn-hidden-size", 24, "--swiglu"),
    *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "allgather"),
    *("--finetune", "--no-load-optim", "--no-load-rng", "--exit-interval", 1),
)


def test_a_stock_run_loads_the_checkpoint_or_says_why_not(tmp_path: Path, trained: Trained) -> None:
    """With all experts the loss of its first step is ours."""
    train(*GATED, "--save", tmp_path)
    ours = train(*GATED, "--load", tmp_path, "--finetune")
    loading = (*STOCK, "--load", tmp_path)
    stock = train(*loading, "--moe-router-topk", 4)
    assert stock.losses[1] == pytest.approx(ours.losses[1], rel=1e-6)
    assert "dense-moe: checkpoint" in stock.output
    failed = train(*loading, "--moe-router-topk", 2, check=False)
    assert failed.returncode
    assert "--moe-router-pre-softmax: a softmax after the choice would renorm" in failed.output
    failed = train(*STOCK, "--moe-router-topk", 4, "--load", trained.folder, check=False)
    assert failed.returncode
    for said in ("--dsmoe-attention-experts: a stock attention has none", "--swiglu: the check"):
        assert said in failed.output
