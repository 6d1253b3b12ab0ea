"""What W4A4 refuses and says before anything is built."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import pytest

from megatron_plugins.refusals import refuse
from megatron_plugins.w4a4 import REFUSED, adjust_config, validate
from torch_plugins.config import W4A4, ConfigError

FLAG = "--w4a4"
WEIGHTS = ("--w4a4-weight-bits", "4")
TYPED: dict[str, tuple[str, ...]] = {
    "--fp8-format": ("--fp8-format", "e4m3"),
    "--fp4-format": ("--fp4-format", "e2m1"),
    "--transformer-impl transformer_engine": (
        *("--transformer-impl", "transformer_engine", "--no-gradient-accumulation-fusion"),
        *WEIGHTS,
    ),
    "--transformer-impl inference_optimized": ("--transformer-impl", "inference_optimized"),
    "--use-transformer-engine-op-fuser": ("--use-transformer-engine-op-fuser",),
    "--inference-fuse-tp-communication": ("--inference-fuse-tp-communication",),
    "--tp-comm-overlap": ("--tp-comm-overlap",),
    "--mlp-chunks-for-prefill": ("--mlp-chunks-for-prefill", "4"),
    "--moe-grouped-gemm": ("--moe-grouped-gemm",),
    "--moe-shared-expert-overlap": ("--moe-shared-expert-overlap",),
    "--expert-tensor-parallel-size": ("--num-experts", "4", "--expert-tensor-parallel-size", "2"),
    "--overlap-moe-expert-parallel-comm": ("--overlap-moe-expert-parallel-comm",),
    "--multi-latent-attention": ("--multi-latent-attention",),
    "--experimental-attention-variant": ("--experimental-attention-variant", "gated_delta_net"),
    "--hybrid-layer-pattern": ("--hybrid-layer-pattern", "M*M*"),
    "--mtp-num-layers": ("--mtp-num-layers", "1"),
    "--num-query-groups": (
        *("--group-query-attention", "--num-query-groups", "2"),
        *("--tensor-model-parallel-size", "4"),
    ),
    "--attention-output-gate": ("--attention-output-gate",),
    "--moe-mlp-glu-interleave-size": ("--moe-mlp-glu-interleave-size", "32"),
    "--ladder-residual": ("--ladder-residual", "--tensor-model-parallel-size", "2"),
    "--dense-moe": ("--dsmoe-num-experts", "4", "--dsmoe-ffn-hidden-size", "8"),
    "--cross-layer-attention": (
        *("--cla-sharing-factor", "2", "--transformer-impl", "transformer_engine"),
    ),
    "--cuda-graph-impl": ("--cuda-graph-impl", "local"),
    "--use-megatron-fsdp": ("--use-megatron-fsdp",),
    "--use-torch-fsdp2": ("--use-torch-fsdp2",),
    "--use-precision-aware-optimizer": ("--use-precision-aware-optimizer",),
    "--optimizer-cpu-offload": ("--optimizer-cpu-offload",),
}
ELSEWHERE = {
    "--kitchen-config-file": dict(kitchen_config_file="file"),
    "--modelopt-enabled": dict(modelopt_enabled=True),
}
"""Arguments that only Kitchen and ModelOpt's own scripts add."""


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def parsed(parser: ArgumentParser, *flags: str) -> Namespace:
    local = () if "--transformer-impl" in flags else ("--transformer-impl", "local")
    return parser.parse_args([FLAG, *local, *flags])


def test_the_table_is_covered() -> None:
    assert {row.flag for row in REFUSED} == {*TYPED, *ELSEWHERE, "gradient accumulation fusion"}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--transformer-impl", "transformer_engine"),
        ("--ladder-residual",),
        ("--ladder-residual", "--tensor-model-parallel-size", "2", "--w4a4-kurtosis-weight", "0"),
        ("--cla-sharing-factor", "2"),
        ("--optimizer-cpu-offload", "--w4a4-clip-init", "4"),
        ("--num-experts", "4", "--expert-tensor-parallel-size", "1"),
        (*WEIGHTS, "--no-gradient-accumulation-fusion"),
    ],
)
def test_not_refused(parser: ArgumentParser, flags: tuple[str, ...]) -> None:
    refuse(parsed(parser, *flags), FLAG, REFUSED)


@pytest.mark.parametrize("flag", TYPED)
def test_refused(parser: ArgumentParser, flag: str) -> None:
    for word in TYPED[flag]:
        if word.startswith("--") and word not in parser.format_help():
            pytest.skip(f"this Megatron has no {word}")
    with pytest.raises(ConfigError) as error:
        refuse(parsed(parser, *TYPED[flag]), FLAG, REFUSED)
    assert f"{FLAG} with {flag}: " in str(error.value)
    assert str(error.value).count(f"{FLAG} with") == 1


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_refused_where_others_add_it(parser: ArgumentParser, flag: str) -> None:
    args = parsed(parser)
    vars(args).update(ELSEWHERE[flag])
    with pytest.raises(ConfigError, match=f"{FLAG} with {flag}: "):
        refuse(args, FLAG, REFUSED)


def test_fused_gradients_are_refused_where_weights_are_quantized(parser: ArgumentParser) -> None:
    """They are added to the weight's own; with inputs alone nothing is in the way."""
    with pytest.raises(ConfigError, match="add --no-gradient-accumulation-fusion"):
        refuse(parsed(parser, *WEIGHTS), FLAG, REFUSED)


def test_patterns_that_match_nothing(parser: ArgumentParser) -> None:
    args = parsed(parser, "--num-layers", "2")
    validate(args, W4A4(modules="*.1.mlp.linear_fc2"))
    with pytest.raises(ConfigError, match=r"--w4a4-modules '\*q_proj': matches no linear layer"):
        validate(args, W4A4(modules="*q_proj"))


@pytest.mark.parametrize(
    ("modules", "numbered"), [("*", False), ("*linear_fc1", False), ("*.1.*", True)]
)
def test_layers_are_numbered_where_they_differ(modules: str, numbered: bool) -> None:
    config: Any = Namespace(num_layers=3, hetereogenous_dist_checkpoint=False)
    adjust_config(config, W4A4(modules=modules))
    assert config.hetereogenous_dist_checkpoint is numbered
