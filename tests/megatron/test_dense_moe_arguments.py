"""What DS-MoE sets, refuses and says before anything is built."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import pytest

from megatron_plugins.dense_moe import REFUSED, stock, validate
from megatron_plugins.refusals import refuse
from tests.megatron.harness import TINY
from torch_plugins.config import ConfigError, DenseMoE

FLAG = "--dense-moe"
PLAIN = (
    *("--dsmoe-num-experts", "4", "--dsmoe-ffn-hidden-size", "24", "--disable-bias-linear"),
    *("--dsmoe-attention-experts", "2"),
)
TYPED = {
    "--num-experts": ("--num-experts", "4"),
    "--multi-latent-attention": ("--multi-latent-attention",),
    "--experimental-attention-variant": ("--experimental-attention-variant", "gated_delta_net"),
    "--heterogeneous-layers-config-path": ("--heterogeneous-layers-config-path", "layers.json"),
    "--use-transformer-engine-op-fuser": ("--use-transformer-engine-op-fuser",),
    "--transformer-impl inference_optimized": ("--transformer-impl", "inference_optimized"),
    "--inference-fuse-tp-communication": ("--inference-fuse-tp-communication",),
    "--squared-relu": ("--squared-relu",),
    "--quick-geglu": ("--quick-geglu",),
    "--context-parallel-size": ("--context-parallel-size", "2"),
    "--hybrid-layer-pattern": ("--hybrid-layer-pattern", "*-*-"),
    "--mtp-num-layers": ("--mtp-num-layers", "1"),
    "--cuda-graph-impl": ("--cuda-graph-impl", "local"),
    "--overlap-moe-expert-parallel-comm": ("--overlap-moe-expert-parallel-comm",),
    "--use-megatron-fsdp": ("--use-megatron-fsdp",),
    "--use-torch-fsdp2": ("--use-torch-fsdp2",),
    "--fp8-format": ("--fp8-format", "e4m3", "--dsmoe-inference", "threshold"),
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def test_the_table_is_covered() -> None:
    assert {row.flag for row in REFUSED} == {*TYPED, "biases"}


@pytest.mark.parametrize("flags", [(), ("--fp8-format", "e4m3")], ids=["plain", "fp8"])
def test_not_refused(parser: ArgumentParser, flags: tuple[str, ...]) -> None:
    refuse(parser.parse_args([*PLAIN, *flags]), FLAG, REFUSED)


def test_biases_are_refused(parser: ArgumentParser) -> None:
    with pytest.raises(ConfigError, match="add --disable-bias-linear"):
        refuse(
            parser.parse_args(["--dsmoe-num-experts", "4", "--ffn-hidden-size", "8"]), FLAG, REFUSED
        )


@pytest.mark.parametrize("flag", TYPED)
def test_refused(parser: ArgumentParser, flag: str) -> None:
    if TYPED[flag][0] not in parser.format_help():
        pytest.skip(f"this Megatron has no {TYPED[flag][0]}")
    with pytest.raises(ConfigError) as error:
        refuse(parser.parse_args([*PLAIN, *TYPED[flag]]), FLAG, REFUSED)
    assert f"{FLAG} with {flag}: " in str(error.value)
    assert str(error.value).count(f"{FLAG} with") == 1


Parsed = Callable[..., Namespace]


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """Megatron's validated arguments."""
    from megatron.training import arguments

    def validated(*flags: object) -> Namespace:
        words = ["pretrain_gpt.py", *TINY, "--transformer-impl", "local"]
        monkeypatch.setattr("sys.argv", [*words, "--disable-bias-linear", *map(str, flags)])
        monkeypatch.setenv("WORLD_SIZE", "1")
        args = arguments.parse_args()
        arguments.validate_args(args)
        return args

    return validated


def sizes(args: Namespace, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(args, name) for name in names)


def test_sizes_follow_from_the_experts(validated: Parsed) -> None:
    """The MLP's width, the key-value heads, and no fusion with a bias that is not there."""
    args = validated(*PLAIN)
    assert sizes(args, "ffn_hidden_size", "num_query_groups", "group_query_attention") == (
        *(96, 2, True),
    )
    assert sizes(args, "swiglu", "bias_gelu_fusion", "dense_moe") == (False, False, True)
    gated = validated("--dsmoe-num-experts", 4, "--ffn-hidden-size", 96, "--dsmoe-gated")
    assert sizes(gated, "ffn_hidden_size", "swiglu", "group_query_attention") == (96, True, False)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("1b", (24, 2048, 32, 2, 64, 8192)),
        ("3b", (28, 3072, 32, 4, 96, 12288)),
        ("6b", (36, 4096, 32, 4, 128, 16384)),
    ],
)
def test_presets_are_whole_models(parser: Any, preset: str, expected: tuple[int, ...]) -> None:
    """Layers, width, query and key-value heads, head size, width of the MLP; what is typed wins."""
    args = parser.parse_args(["--dsmoe-preset", preset])
    names = "num_layers hidden_size num_attention_heads num_query_groups kv_channels"
    assert sizes(args, *names.split(), "ffn_hidden_size") == expected
    assert parser.parse_args(["--dsmoe-preset", preset, "--num-layers", "2"]).num_layers == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dsmoe-num-experts", 4), "without a width: give --dsmoe-ffn-hidden-size"),
        (("--dsmoe-num-experts", 4, "--ffn-hidden-size", 90), "90 is not a multiple"),
        (
            ("--dsmoe-num-experts", 4, "--dsmoe-ffn-hidden-size", 8, "--ffn-hidden-size", 64),
            "--ffn-hidden-size 64: --dsmoe-ffn-hidden-size 8 makes it 32",
        ),
        (("--dsmoe-attention-experts", 3), "--num-attention-heads 4 is not a multiple"),
        (
            ("--dsmoe-attention-experts", 2, "--num-query-groups", 4, "--group-query-attention"),
            "--num-query-groups 4: --dsmoe-attention-experts 2 makes it 2",
        ),
        ((*PLAIN, "--swiglu"), "say --dsmoe-gated for SwiGLU experts"),
        ((*PLAIN, "--dsmoe-top-k", 2), "does nothing with dense_moe.inference"),
        (("--dsmoe-threshold", 0.3), "without experts: give"),
        ((*PLAIN, "--dsmoe-num-expert", 2), "did you mean '--dsmoe-num-experts'"),
    ],
)
def test_wrong_flags(validated: Parsed, flags: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(*flags)


def test_experts_are_not_split_over_processes(parser: Any) -> None:
    flags = ["--dsmoe-num-experts", "2", "--dsmoe-ffn-hidden-size", "64"]
    args = parser.parse_args([*flags, "--tensor-model-parallel-size", "4"])
    with pytest.raises(
        ConfigError, match="each process has whole experts; use a size that divides"
    ):
        validate(args, DenseMoE(num_experts=2))


def test_what_a_stock_run_cannot_express_is_named(parser: Any) -> None:
    """All that is wrong at once; a run without stock MoE layers is none of this."""
    feature = DenseMoE(num_experts=4, attention_experts=2)
    saved = parser.parse_args([*PLAIN])
    assert not stock.in_stock(feature, saved, parser.parse_args([]))
    flags = ["--num-experts", "8", "--moe-router-topk", "2", "--ffn-hidden-size", "48", "--swiglu"]
    flags += ["--moe-expert-capacity-factor", "1.5", "--moe-router-score-function", "sigmoid"]
    with pytest.raises(ConfigError) as error:
        stock.in_stock(feature, saved, parser.parse_args(flags))
    for flag in (
        *("attention-experts: ", "router: ", "--num-experts: ", "--moe-ffn-hidden-size: the"),
        *("--swiglu: ", "--disable-bias-linear: ", "--moe-router-pre-softmax: "),
        *("--moe-router-score-function: ", "--moe-expert-capacity-factor: "),
    ):
        assert flag in str(error.value)
