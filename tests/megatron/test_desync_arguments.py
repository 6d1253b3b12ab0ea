"""What Desync Residual sets, refuses and says before anything is built."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pytest

from megatron_plugins.arguments import check_features, features_of
from megatron_plugins.desync_residual import REFUSED
from megatron_plugins.refusals import refuse
from tests.megatron.harness import TINY
from torch_plugins.config import ConfigError, DesyncResidual

FLAG = "--desync-residual"
PLAIN = ("--desync-residual", "--disable-bias-linear")
TYPED = {
    "--hidden-dropout with --sequence-parallel": ("--sequence-parallel", "--hidden-dropout", "0.1"),
    "--num-experts": ("--num-experts", "4"),
    "--multi-latent-attention": ("--multi-latent-attention",),
    "--experimental-attention-variant": ("--experimental-attention-variant", "gated_delta_net"),
    "--linear-attention-freq": ("--linear-attention-freq", "2"),
    "--hybrid-layer-pattern": ("--hybrid-layer-pattern", "*-*-"),
    "--heterogeneous-layers-config-path": ("--heterogeneous-layers-config-path", "layers.json"),
    "--mtp-num-layers": ("--mtp-num-layers", "1"),
    "--enable-mhc-connections": ("--enable-mhc-connections",),
    "--distribute-saved-activations": ("--distribute-saved-activations",),
    "--tp-comm-overlap": ("--tp-comm-overlap",),
    "--transformer-impl inference_optimized": ("--transformer-impl", "inference_optimized"),
    "--inference-fuse-tp-communication": ("--inference-fuse-tp-communication",),
    "--use-transformer-engine-op-fuser": ("--use-transformer-engine-op-fuser",),
    "--overlap-moe-expert-parallel-comm": ("--overlap-moe-expert-parallel-comm",),
    "--cuda-graph-impl": ("--cuda-graph-impl", "local"),
    "--use-megatron-fsdp": ("--use-megatron-fsdp",),
    "--use-torch-fsdp2": ("--use-torch-fsdp2",),
    "--ladder-residual": ("--ladder-residual",),
    "--cross-layer-attention": ("--cla-sharing-factor", "2"),
    "--dense-moe": ("--dsmoe-num-experts", "4", "--dsmoe-ffn-hidden-size", "24"),
    "--w4a4": ("--w4a4",),
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def test_the_table_is_covered() -> None:
    assert {row.flag for row in REFUSED} == {*TYPED, "biases"}


@pytest.mark.parametrize(
    "flags", [(), ("--sequence-parallel", "--hidden-dropout", "0"), ("--hidden-dropout", "0.1")]
)
def test_not_refused(parser: ArgumentParser, flags: tuple[str, ...]) -> None:
    refuse(parser.parse_args([*PLAIN, *flags]), FLAG, REFUSED)


def test_biases_are_refused(parser: ArgumentParser) -> None:
    with pytest.raises(ConfigError, match="add --disable-bias-linear"):
        refuse(parser.parse_args([FLAG]), FLAG, REFUSED)


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
def checked(parser: ArgumentParser) -> Parsed:
    """Parsed arguments, after what the plugins demand of them."""

    def checked(*flags: object) -> Namespace:
        args = parser.parse_args([*TINY, "--disable-bias-linear", *map(str, flags)])
        check_features(args, features_of(args))
        return args

    return checked


TP2 = ("--tensor-model-parallel-size", 2)


def test_a_pattern_turns_it_on_and_ranks_are_the_tensor_parallel_size(checked: Parsed) -> None:
    args = checked("--desync-pattern", "4x", *TP2)
    assert args.desync_residual
    assert args.desync_ranks == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (FLAG,),
            "--desync-residual with --tensor-model-parallel-size 1: .* use at least 2 of them",
        ),
        (
            (FLAG, "--desync-ranks", 4, *TP2),
            "--desync-ranks 4 with --tensor-model-parallel-size 2: .* use "
            "--tensor-model-parallel-size 4",
        ),
        (("--desync-pattern", "1x", *TP2), r"\(--desync-pattern\) '1x': use Nx with N at least 2"),
        (("--desync-pattern", "11", *TP2), r"\(--desync-pattern\) '11': .*not all of them 11"),
        (("--desync-pattern", "0,1", *TP2), r"\(--desync-pattern\) '0,1': use Nx"),
        (
            ("--desync-pattern", "00,01,00,01,00", *TP2),
            "'00,01,00,01,00': names 5 layers, the model has 4",
        ),
        (("--desync-ranks", 1, *TP2), r"\(--desync-ranks\) 1: must be a whole number, at least 2"),
        (("--desync-patern", "2x", *TP2), "unknown flag --desync-patern; did you mean"),
    ],
)
def test_wrong_flags(checked: Parsed, flags: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(*flags)


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("2x", 2, "0101"),
        ("3x", 3, "001001"),
        ("3x", 2, "0011"),
        ("4x", 3, "000101"),
        ("last", 2, "0001"),
        ("10", 2, "1011"),
        ("11,00", 3, "110011"),
    ],
)
def test_patterns(pattern: str, layers: int, expected: str) -> None:
    """The last module always reduces; a list is repeated."""
    reduces = DesyncResidual(pattern).resolve(layers)
    assert "".join(str(int(each)) for each in reduces) == expected


def test_places() -> None:
    """A region begins where a module does not reduce after one that did, and ends where one
    does."""
    places = DesyncResidual("11,10,00,01").places(4)
    marks = ["i" * p.inside + "e" * p.enters + "l" * p.leaves for p in places]
    assert marks == ["", "", "", "ie", "i", "i", "i", "il"]
