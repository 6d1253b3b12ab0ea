"""Feature dataclasses and layer specifications."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_plugins.config import FEATURES, ConfigError, DenseMoE, LadderResidual, parse_layers


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


NEEDED = {DenseMoE: {"num_experts": 8}}
"""What a feature does not do without."""


@pytest.mark.parametrize("feature", FEATURES)
def test_round_trip_and_names(feature):
    needed = NEEDED.get(feature, {})
    settings = feature(**needed)
    assert feature.from_dict(settings.to_dict()) == settings
    assert feature.from_dict(needed) == settings
    parser = argparse.ArgumentParser()
    if feature.switch is None:
        assert feature.flag() == f"--{feature.name}"
        assert parser.add_argument(feature.flag(), action="store_true").dest == feature.key()
    for name in settings.to_dict():
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


def test_dense_moe_presets_are_the_papers():
    """Table 1 of the paper; what is given beside a preset goes first."""
    small = DenseMoE(preset="1b")
    assert (small.num_experts, small.ffn_hidden_size, small.attention_experts) == (32, 256, 16)
    assert (small.mi_weight_mlp, small.mi_weight_attention) == (6.3e-4, 3.5e-4)
    assert DenseMoE(preset="6b", attention_experts=0).attention_experts == 0
    assert DenseMoE(num_experts=4).mi_weight_mlp == DenseMoE(preset="3b").mi_weight_mlp == 4e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "without experts: give dense_moe.num_experts"),
        ({"num_experts": 1}, "must be at least 2"),
        ({"num_experts": 4, "top_k": 2}, "does nothing with dense_moe.inference"),
        ({"num_experts": 4, "inference": "top-k"}, "needs dense_moe.top_k"),
        ({"num_experts": 4, "inference": "top-k", "top_k": 5}, "there are 4 experts"),
        ({"num_experts": 4, "attention_inference": "threshold"}, "no attention_experts"),
        ({"num_experts": 4, "threshold": 1.0}, "below 1"),
        ({"num_experts": 4, "router": "linaer"}, "did you mean 'linear'"),
        ({"num_experts": 4, "mi_weight_mlp": -1}, "not negative"),
        ({"preset": "2b"}, "unknown"),
        ({"num_experts": 4, "gated": "yes"}, "true or false"),
    ],
)
def test_dense_moe_settings_that_are_wrong(fields, message):
    with pytest.raises(ConfigError, match=message):
        DenseMoE(**fields)


def test_dense_moe_rules_of_inference():
    assert DenseMoE(num_experts=4).kept() is None
    assert DenseMoE(num_experts=4, inference="top-k", top_k=2).kept() == (2, None)
    assert DenseMoE(num_experts=4, inference="threshold").kept() == (None, 0.48)
    assert DenseMoE(num_experts=4, inference="threshold-top-k").kept() == (4, 0.48)
    heads = DenseMoE(attention_experts=8, attention_inference="threshold-top-k", attention_top_k=3)
    assert heads.kept(attention=True) == (3, 0.48)
