"""Feature dataclasses and layer specifications."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_plugins.config import FEATURES, ConfigError, LadderResidual, parse_layers


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        (" ALL ", (0, 1, 2, 3, 4, 5)),
        ("none", ()),
        ("3", (3,)),
        ("1-3", (1, 2, 3)),
        ("2-2", (2,)),
        ("last:2", (4, 5)),
        ("last:6", (0, 1, 2, 3, 4, 5)),
        ("4, 0-1,last:1", (0, 1, 4, 5)),
        ("1-3,2-4", (1, 2, 3, 4)),
    ],
)
def test_parse_layers(spec, layers):
    assert parse_layers(spec, 6) == layers


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("", "''"),
        ("first", "'first'"),
        ("1,", "''"),
        ("-1", "'-1'"),
        ("1-", "'1-'"),
        ("1-2-3", "'1-2-3'"),
        ("last:", "'last:'"),
        ("last:0", "last:0"),
        ("last:7", "6 layers"),
        ("6", "layers 0 to 5"),
        ("4-6", "layers 0 to 5"),
        ("3-1", "'3-1'"),
        ("1.5", "'1.5'"),
        ("all,1", "'all'"),
    ],
)
def test_parse_layers_names_the_flag_and_the_fault(spec, part):
    with pytest.raises(ConfigError) as error:
        parse_layers(spec, 6, "--ladder-layers")
    assert "--ladder-layers" in str(error.value)
    assert part in str(error.value)


@given(st.integers(1, 40), st.data())
def test_parse_layers_reads_any_set_of_indices(num_layers, data):
    chosen = data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    spec = ",".join(map(str, data.draw(st.permutations(sorted(chosen)))))
    assert parse_layers(spec, num_layers) == tuple(sorted(chosen))


@pytest.mark.parametrize("feature", FEATURES)
def test_round_trip_and_names(feature):
    assert feature.from_dict(feature().to_dict()) == feature()
    assert feature.from_dict({}) == feature()
    parser = argparse.ArgumentParser()
    if feature.switch is None:
        assert feature.flag() == f"--{feature.name}"
        assert parser.add_argument(feature.flag(), action="store_true").dest == feature.key()
    for name in feature().to_dict():
        assert parser.add_argument(feature.flag(name)).dest == feature.dest(name)


def test_ladder_flags():
    assert LadderResidual.flag() == "--ladder-residual"
    assert LadderResidual.flag("layers") == "--ladder-layers"
    assert LadderResidual("last:2").resolve(8) == (6, 7)


@pytest.mark.parametrize(
    ("key", "hint"), [("layer", "did you mean 'layers'"), ("zebra", "known: layers")]
)
def test_unknown_key_is_an_error_with_a_suggestion(key, hint):
    with pytest.raises(ConfigError, match=f"ladder_residual: unknown key '{key}'; {hint}"):
        LadderResidual.from_dict({key: "all"})
