"""The plugins' flags in Megatron's own parser, validation, configuration and checkpoints."""

import json
from argparse import ArgumentParser, Namespace

import pytest

from megatron_plugins import activity, arguments, checkpoints
from megatron_plugins.refusals import Refusal, refuse
from tests.megatron.harness import TINY, train
from torch_plugins.config import FEATURES, ConfigError, LadderResidual


@pytest.fixture
def parse(monkeypatch):
    """Megatron's ``parse_args`` on a command line."""
    upstream = pytest.importorskip("megatron.training.arguments")

    def parse(*flags, world_size=1, **kwargs):
        monkeypatch.setattr(
            "sys.argv", ["pretrain_gpt.py", *TINY, "--transformer-impl", "local", *map(str, flags)]
        )
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return upstream.parse_args(**kwargs)

    return parse


@pytest.fixture
def config_of(parse):
    """Megatron's validated arguments and the transformer configuration made from them."""
    upstream = pytest.importorskip("megatron.training.arguments")

    def config_of(*flags, **kwargs):
        args = parse(*flags, **kwargs)
        upstream.validate_args(args, {})
        return args, upstream.core_transformer_config_from_args(args)

    return config_of


def test_help_shows_a_group_with_the_paper_for_every_feature():
    from megatron.training.arguments import add_megatron_arguments

    text = add_megatron_arguments(ArgumentParser()).format_help()
    for feature in FEATURES:
        assert f"{feature.title} (plugin):" in text
        assert f"https://arxiv.org/abs/{feature.paper}" in text
        assert feature.flag().split()[0] in text
    assert "--ladder-layers SPEC" in text
    assert "--cpu-backend" in text


def test_flags_become_features(parse):
    assert arguments.features_of(parse()) == {}
    assert parse().ladder_layers is None
    args = parse("--ladder-residual")
    assert (args.ladder_residual, args.ladder_layers) == (True, "all")
    args = parse("--ladder-residual", "--ladder-layers", "last:2")
    assert arguments.features_of(args) == {"ladder_residual": LadderResidual("last:2")}
    assert arguments.features_of(Namespace()) == {}  # a checkpoint without the plugins


def test_field_without_its_feature(parse):
    with pytest.raises(
        ConfigError, match="--ladder-layers last:2 does nothing without --ladder-residual"
    ):
        parse("--ladder-layers", "last:2")


@pytest.mark.parametrize("ignore_unknown_args", [False, True])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--ladder-layer=last:2", "--ladder-layers"),
        ("--ladder-resdual", "--ladder-residual"),
        ("--lader-residual", "--ladder-residual"),
        ("--cpu-backends", "--cpu-backend"),
    ],
)
def test_did_you_mean(parse, typed, meant, ignore_unknown_args):
    message = f"unknown flag {typed.split('=')[0]}; did you mean '{meant}'"
    with pytest.raises(ConfigError, match=message):
        parse(typed, ignore_unknown_args=ignore_unknown_args)


def test_flags_of_others_are_left_to_megatron(parse, capsys):
    assert parse("--someone-elses", 3, ignore_unknown_args=True).num_layers == 4
    with pytest.raises(SystemExit):
        parse("--someone-elses", 3)
    assert "unrecognized arguments: --someone-elses" in capsys.readouterr().err


def test_yaml_would_lose_the_flag(parse):
    with pytest.raises(ConfigError, match=r"--ladder-residual with --yaml-cfg model\.yaml"):
        parse("--ladder-residual", "--yaml-cfg", "model.yaml")


def test_cpu_flag_too_late(parse, monkeypatch):
    monkeypatch.setattr("megatron_plugins.cpu._installed", False)
    with pytest.raises(ConfigError, match="--cpu-backend was not on the command line"):
        parse("--cpu-backend")


def test_cpu_backend_that_refused_to_start_is_told_at_parsing(parse, monkeypatch):
    monkeypatch.setattr("megatron_plugins.seams.doors.cpu_error", ConfigError("a GPU is present"))
    with pytest.raises(ConfigError, match="a GPU is present"):
        parse()


def test_refusals_come_in_one_error():
    table = (
        Refusal("--one", lambda args: args.one, "first reason"),
        Refusal("--two", lambda args: args.two, "second reason"),
        Refusal("--three", lambda args: args.three, "third reason"),
    )
    args = Namespace(one=True, two=False, three=True)
    with pytest.raises(ConfigError) as error:
        refuse(args, "--ladder-residual", table)
    text = str(error.value)
    assert "--ladder-residual with --one: first reason" in text
    assert "--ladder-residual with --three: third reason" in text
    assert "--two" not in text
    refuse(Namespace(one=False, two=False, three=False), "--ladder-residual", table)


def test_validation_refuses(config_of):
    with pytest.raises(ConfigError, match=r"--ladder-residual .* --symmetric-ar-type"):
        config_of("--ladder-residual", "--symmetric-ar-type", "two_shot")


@pytest.mark.parametrize("layers", ["none", "7", "last:5", "x"])
def test_layers_that_are_not_there(config_of, layers):
    with pytest.raises(ConfigError, match=f"--ladder-layers.*{layers}"):
        config_of("--ladder-residual", "--ladder-layers", layers)


def test_config_is_untouched_without_a_flag(config_of):
    _, config = config_of("--pipeline-model-parallel-size", 2, world_size=2)
    assert not hasattr(config, "megatron_plugins")
    assert not config.variable_seq_lengths


MLA = "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --v-head-dim 8"


@pytest.mark.parametrize("more", ["", MLA, "--num-experts 4"], ids=["plain", "mla", "moe"])
def test_config_carries_the_features(config_of, more):
    flags = ("--ladder-residual", "--ladder-layers", "0-1", "--pipeline-model-parallel-size", 2)
    _, config = config_of(*flags, *more.split(), world_size=2)
    assert config.megatron_plugins == {"ladder_residual": LadderResidual("0-1")}
    assert config.variable_seq_lengths
    assert type(config).__name__ == ("MLATransformerConfig" if more == MLA else "TransformerConfig")


def test_heterogeneous_config_carries_the_features(config_of):
    from megatron.training.arguments import core_transformer_config_from_args

    layer = {"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 128}}
    args, _ = config_of()
    args.heterogeneous_layers_config_path = "layers.json"  # the encoded text below is read instead
    args.heterogeneous_layers_config_encoded_json = json.dumps({"block_configs": [layer] * 4})
    arguments.set_features(args, {"ladder_residual": LadderResidual()})
    config = core_transformer_config_from_args(args)
    assert type(config).__name__ == "HeterogeneousTransformerConfig"
    assert config.megatron_plugins == {"ladder_residual": LadderResidual()}


def test_model_config_carries_the_features(config_of):
    argument_utils = pytest.importorskip("megatron.training.argument_utils")
    if not hasattr(argument_utils, "gpt_config_from_args"):
        pytest.skip("0.19 and newer build models from a GPTModelConfig")
    args, _ = config_of("--ladder-residual")
    args.padded_vocab_size = 256
    model_config = argument_utils.gpt_config_from_args(args)
    assert model_config.transformer.megatron_plugins == {"ladder_residual": LadderResidual()}


def test_a_feature_that_no_layer_uses_is_an_error():
    features = {"ladder_residual": LadderResidual("last:2")}
    lines = activity.summary(features, 4, {"ladder_residual": {1, 2, 3}})
    assert lines == ["ladder-residual: 2 of 4 layers"]
    for active in ({}, {"ladder_residual": {2}}):
        with pytest.raises(ConfigError, match=r"--ladder-residual is on, but layers \[.*3\]"):
            activity.summary(features, 4, active)


def test_features_of_a_spec_count_as_typed(config_of, monkeypatch):
    from megatron.training import global_vars

    ladder = {"ladder_residual": LadderResidual("last:2")}
    arguments.adopt(ladder)  # no arguments, as when Megatron-Core is used as a library
    args, _ = config_of()
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    arguments.adopt(ladder)
    assert arguments.features_of(args) == ladder
    args, _ = config_of()
    args.use_torch_fsdp2 = True
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    with pytest.raises(ConfigError, match="--use-torch-fsdp2"):
        arguments.adopt(ladder)


def saved(layers=None, **more):
    """Arguments of a run with or without the ladder."""
    return Namespace(num_layers=4, ladder_residual=layers is not None, ladder_layers=layers, **more)


def test_checkpoint_of_another_function_is_refused(capsys):
    for run in (saved(finetune=False), saved("last:2", finetune=False)):
        with pytest.raises(ConfigError, match=r"--ladder-residual --ladder-layers all.*--finetune"):
            checkpoints.check(run, saved("all"), "folder")
    assert capsys.readouterr().out == ""
    checkpoints.check(saved("last:2", finetune=True), saved("all"), "folder")
    assert "retrain" in capsys.readouterr().out


def test_checkpoint_of_the_same_function_is_loaded_in_silence(capsys):
    checkpoints.check(saved("all", finetune=False), saved("0-3", finetune=False), "folder")
    checkpoints.check(saved(finetune=False), Namespace(), "folder")
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folders with one iteration of the standard model and of a partial ladder on two stages."""
    root = tmp_path_factory.mktemp("checkpoints")
    once = ("--exit-interval", 1, "--save-interval", 1, "--save")
    train(*once, root / "standard")
    ladder = ("--ladder-residual", "--ladder-layers", "last:2")
    run = train(*ladder, *once, root / "ladder", "--pipeline-model-parallel-size", 2, processes=2)
    assert run.output.count("ladder-residual: 2 of 4 layers\n") == 1  # both on the second stage
    return root


def test_standard_checkpoint_into_a_ladder(checkpoint):
    run = train("--ladder-residual", "--load", checkpoint / "standard", "--exit-interval", 2)
    assert "standard checkpoint loaded into a Ladder Residual model: another function" in run.output


def test_ladder_checkpoint_into_a_standard_run(checkpoint):
    run = train("--load", checkpoint / "ladder", "--exit-interval", 2, check=False)
    assert run.returncode != 0
    assert "has --ladder-residual --ladder-layers last:2, this run does not" in run.output


def test_use_checkpoint_args_restores_the_flags(checkpoint):
    run = train("--use-checkpoint-args", "--load", checkpoint / "ladder", "--exit-interval", 2)
    assert "Setting --ladder-residual --ladder-layers last:2 from checkpoint\n" in run.output
    assert "ladder-residual: 2 of 4 layers\n" in run.output
    assert "another function" not in run.output
