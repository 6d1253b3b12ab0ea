"""The CPU backend: trainings agree across layouts, resume exactly, and bad options are loud."""

import importlib
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron_plugins import cpu
from megatron_plugins.cpu.args import REFUSED
from tests.megatron.harness import train
from torch_plugins.config import ConfigError

PIECES_SCRIPT = Path(__file__).with_name("cpu_pieces.py")
MOE = ("--num-experts", 4, "--moe-router-topk", 2, "--swiglu", "--disable-bias-linear")
# Upstream cannot reshard Adam's state between expert-parallel sizes: an optimizer without any.
SGD = ("--optimizer", "sgd", "--sgd-momentum", 0, "--lr", 0.1)
DROPOUT = ("--hidden-dropout", 0.1, "--attention-dropout", 0.1)
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)


def assert_continues(run, straight, rel):
    """``run`` is iterations 4 to 6 of ``straight``."""
    assert sorted(run.losses) == [4, 5, 6]
    for iteration, loss in run.losses.items():
        assert loss == pytest.approx(straight.losses[iteration], rel=rel)
        assert run.grad_norms[iteration] == pytest.approx(straight.grad_norms[iteration], rel=rel)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """One process, six iterations, a checkpoint after the third; started by the flag alone."""
    folder = tmp_path_factory.mktemp("dense")
    flags = ("--cpu-backend", "--save", folder, "--save-interval", 3)
    run = train(*flags, environment={"MEGATRON_PLUGINS_CPU": ""})
    return folder, run


def test_training_learns(dense):
    _, run = dense
    assert sorted(run.losses) == [1, 2, 3, 4, 5, 6]
    assert run.losses[6] < run.losses[1] - 0.2
    assert run.printed[1][0] == pytest.approx(run.losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        pytest.param((), 1, id="TP1"),
        pytest.param(TP2, 2, id="TP2"),
        pytest.param((*TP2, "--sequence-parallel"), 2, id="TP2-SP"),
        pytest.param(PP2, 2, id="PP2"),
        pytest.param(
            (
                *PP2,
                "--num-layers-per-virtual-pipeline-stage",
                1,
                "--no-overlap-p2p-communication",
            ),
            2,
            id="PP2-VPP2",
        ),
    ],
)
def test_layouts_continue_one_checkpoint(dense, flags, processes):
    folder, straight = dense
    run = train("--load", folder, "--ckpt-step", 3, *flags, processes=processes)
    assert_continues(run, straight, rel=0 if processes == 1 else 2e-6)
    forced = "as if given" in run.output and "no --no-overlap-p2p-communication" in run.output
    assert forced == ("--no-overlap-p2p-communication" in flags)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    dispatcher = ("--moe-token-dispatcher-type", "allgather")
    return folder, train(*MOE, *SGD, *dispatcher, "--save", folder, "--save-interval", 3)


@pytest.mark.parametrize(
    "flags",
    [(), (*TP2, "--sequence-parallel", "--expert-tensor-parallel-size", 1)],
    ids=["DP2", "TP2-SP"],
)
def test_expert_parallel_all_to_all_continues_all_gather(experts, flags):
    folder, straight = experts
    dispatcher = ("--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", 2)
    resume = ("--load", folder, "--ckpt-step", 3, "--no-load-optim")
    run = train(*MOE, *SGD, *dispatcher, *resume, *flags, processes=2)
    assert_continues(run, straight, rel=2e-6)


@pytest.mark.parametrize(
    "sharding", [(), ("--dist-ckpt-optim-fully-reshardable",)], ids=["default", "reshardable"]
)
def test_distributed_optimizer_resumes_exactly(tmp_path, sharding):
    """Dropout, bf16 and overlapped collectives on: what is lost in a checkpoint shows."""
    flags = (
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
        "--bf16",
        *DROPOUT,
        *sharding,
    )
    straight = train(*flags, "--save", tmp_path, "--save-interval", 3, processes=2)
    resumed = train(*flags, "--load", tmp_path, "--ckpt-step", 3, processes=2)
    assert_continues(resumed, straight, rel=0)


def test_recompute_replays_dropout():
    plain = train(*DROPOUT, "--exit-interval", 2)
    full = ("--recompute-granularity", "full", "--recompute-method", "uniform")
    recomputed = train(*DROPOUT, *full, "--recompute-num-layers", 2, "--exit-interval", 2)
    assert recomputed.losses == plain.losses
    assert recomputed.grad_norms == plain.grad_norms


def test_every_piece_redirects_and_can_be_undone():
    assert "PIECES ARE FINE" in train(script=PIECES_SCRIPT).output


def test_pieces_have_names_and_reasons():
    assert len({piece.name for piece in cpu.PIECES}) == len(cpu.PIECES)
    for piece in cpu.PIECES:
        assert piece.reason
        assert piece.needed_by
        assert piece.apply or piece.modules


def test_refuses_where_a_gpu_is_present(monkeypatch):
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(cpu, "gpu_present", lambda: True)
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"--cpu-backend.*MEGATRON_PLUGINS_CPU.*=force"):
        cpu.install()
    assert not cpu.installed()


@pytest.mark.parametrize(
    ("argv", "value", "expected"),
    [
        (["pretrain_gpt.py"], None, False),
        (["pretrain_gpt.py", "--cpu-backend"], None, True),
        (["pretrain_gpt.py"], "1", True),
        (["pretrain_gpt.py"], "force", True),
        (["pretrain_gpt.py"], "0", False),
        (["pretrain_gpt.py", "--cpu-backend"], "", True),
    ],
)
def test_wanted(argv, value, expected):
    assert cpu.wanted(argv, {} if value is None else {cpu.VARIABLE: value}) == expected


def test_unknown_value_of_the_variable():
    with pytest.raises(ConfigError, match=r"MEGATRON_PLUGINS_CPU='maybe'.*force"):
        cpu.wanted([], {cpu.VARIABLE: "maybe"})


def parse(*flags: str) -> Namespace:
    """Megatron's parsed, not yet validated arguments."""
    add_megatron_arguments = importlib.import_module(
        "megatron.training.arguments"
    ).add_megatron_arguments
    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    if flags and flags[0] not in parser._option_string_actions:
        pytest.skip(f"this Megatron has no {flags[0]}")
    return parser.parse_args(flags)


CANNOT_RUN = [
    ("--context-parallel-size", "2"),
    ("--transformer-impl", "inference_optimized"),
    ("--multi-latent-attention",),
    ("--fp8-format", "hybrid"),
    ("--fp4-format", "e2m1"),
    ("--tp-comm-overlap",),
    ("--use-precision-aware-optimizer",),
    ("--te-rng-tracker",),
    ("--enable-cuda-graph",),
    ("--external-cuda-graph",),
    ("--cuda-graph-impl", "local"),
    ("--use-megatron-fsdp",),
    ("--use-torch-fsdp2",),
    ("--use-nccl-ub",),
    ("--moe-token-dispatcher-type", "flex"),
    ("--overlap-moe-expert-parallel-comm",),
    ("--optimizer-cpu-offload",),
    ("--cpu-offloading-num-layers", "1"),
    ("--num-experts", "4"),
]


@pytest.mark.parametrize("flags", CANNOT_RUN, ids=" ".join)
def test_refused_options(flags):
    with pytest.raises(ConfigError, match=flags[0]) as error:
        cpu.adjust_args(parse(*flags))
    assert "--cpu-backend" in str(error.value)


def test_every_refusal_is_tested():
    assert {row.flag.split()[0] for row in REFUSED} == {flags[0] for flags in CANNOT_RUN}


def test_adjusted_options_are_printed_once_and_only_if_changed(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    args = parse()
    cpu.adjust_args(args)
    assert "--transformer-impl local" in capsys.readouterr().out
    assert args.transformer_impl == "local"
    assert args.distributed_backend == "gloo"
    assert not args.masked_softmax_fusion
    assert args.bias_dropout_fusion, "fusions written in torch stay"
    cpu.adjust_args(args)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    cpu.adjust_args(parse())
    assert capsys.readouterr().out == ""


@pytest.mark.megatron_lm
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM=path is not given")
def test_the_real_pretrain_gpt(tmp_path):
    """The checkout's own script: TP2 and PP2 continue a TP1 checkpoint, up to the log's digits."""
    script = Path(os.environ["MEGATRON_LM"]) / "pretrain_gpt.py"
    straight = train("--save", tmp_path, "--save-interval", 3, script=script)
    for flags in (TP2, PP2):
        run = train("--load", tmp_path, "--ckpt-step", 3, *flags, script=script, processes=2)
        assert sorted(run.printed) == [4, 5, 6]
        for iteration, (loss, grad_norm) in run.printed.items():
            assert grad_norm == pytest.approx(straight.printed[iteration][1], abs=2e-3)
            # The log averages the second loss after a start with the first: upstream's way.
            if iteration != 5:
                assert loss == pytest.approx(straight.printed[iteration][0], abs=2e-5)
