"""Every row of the ladder's table of refused combinations, typed as a user would type it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest

from megatron_plugins.ladder_residual import REFUSED
from megatron_plugins.refusals import refuse
from torch_plugins.config import ConfigError

TYPED = {
    "--cuda-graph-impl": ("--cuda-graph-impl", "local"),
    "--tp-comm-overlap": ("--tp-comm-overlap",),
    "--overlap-moe-expert-parallel-comm": ("--overlap-moe-expert-parallel-comm",),
    "--mtp-num-layers": ("--mtp-num-layers", "1"),
    "--enable-mhc-connections": ("--enable-mhc-connections",),
    "--transformer-impl inference_optimized": ("--transformer-impl", "inference_optimized"),
    "--inference-fuse-tp-communication": ("--inference-fuse-tp-communication",),
    "--use-transformer-engine-op-fuser": ("--use-transformer-engine-op-fuser",),
    "--symmetric-ar-type": ("--symmetric-ar-type", "two_shot"),
    "--heterogeneous-layers-config-path": ("--heterogeneous-layers-config-path", "layers.json"),
    "--use-megatron-fsdp": ("--use-megatron-fsdp",),
    "--use-torch-fsdp2": ("--use-torch-fsdp2",),
    "--cpu-offloading-num-layers": ("--cpu-offloading-num-layers", "1"),
    "--fine-grained-activation-offloading": ("--fine-grained-activation-offloading",),
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def parsed(parser: ArgumentParser, *flags: str) -> Namespace:
    return parser.parse_args(["--ladder-residual", *flags])


def test_the_table_is_covered() -> None:
    assert {row.flag for row in REFUSED} == TYPED.keys()


def test_a_plain_ladder_is_not_refused(parser: ArgumentParser) -> None:
    refuse(parsed(parser), "--ladder-residual", REFUSED)


@pytest.mark.parametrize("flag", TYPED)
def test_refused(parser: ArgumentParser, flag: str) -> None:
    if TYPED[flag][0] not in parser.format_help():
        pytest.skip(f"this Megatron has no {TYPED[flag][0]}")
    with pytest.raises(ConfigError) as error:
        refuse(parsed(parser, *TYPED[flag]), "--ladder-residual", REFUSED)
    assert f"--ladder-residual with {flag}: " in str(error.value)
    assert str(error.value).count("--ladder-residual with") == 1
