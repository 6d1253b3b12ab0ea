"""muP of Power LR on Megatron: layers against the recurrence, optimizer groups, whole trainings."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plugins import checkpoints
from megatron_plugins.export.arguments import decoder_config
from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
from megatron_plugins.export.mapping import UNFUSED_NORMS, HFTensors
from megatron_plugins.power_mup import REFUSED, scaled
from megatron_plugins.refusals import refuse
from tests.megatron.harness import Run, run_cases, train
from tests.megatron.ladder_table import WORLD
from tests.megatron.power_mup_table import AGAINST_RECURRENCE
from torch_plugins.config import MUP_PRESETS, ConfigError, MupPreset, PowerMup
from torch_plugins.hf import PluginDecoderForCausalLM
from torch_plugins.mup import param_groups

HERE = Path(__file__).parent
LAYERS = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of power_mup_cases.py over two tensor-parallel processes."""
    return run_cases(HERE / "power_mup_cases.py", tmp_path_factory.mktemp("mup"), WORLD)


@pytest.mark.parametrize("name", AGAINST_RECURRENCE)
def test_outputs_are_multiplied_once(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    if "unknown" in case:
        pytest.skip(f"this Megatron has no {', '.join(case['unknown'])}")
    _, options = AGAINST_RECURRENCE[name]
    half = options.get("bf16")  # rounded once more or less where it is multiplied
    assert case["logits"] <= (2e-2 if half else 1e-6)
    assert case["gradients"] <= (5e-2 if half else 2e-6)
    assert case["from unscaled"] >= 4e-2, "this case could not tell scaled from unscaled"
    assert case["same keys"]
    assert case["same sharded keys"]


@pytest.mark.parametrize("name", ["inference", "inference-llama"])
def test_static_inference_equals_the_full_forward(cases: dict[str, Any], name: str) -> None:
    assert cases[name]["logits"] <= 1e-6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scaled_bias_dropout_add(training: bool, has_bias: bool, dropout: float) -> None:
    """``residual + m * dropout(output + bias)`` and its gradients, with the same dropout mask."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    def tensors() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 3, 8), (5, 3, 8), (8,)]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        return [value.requires_grad_() for value in values]

    output, residual, bias = tensors()
    torch.manual_seed(1)
    add = scaled(get_bias_dropout_add, 0.22)(training, False)
    result = add((output, bias if has_bias else None), residual, dropout)
    x, r, b = tensors()
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x + b if has_bias else x, dropout, training)
    expected = r + 0.22 * dropped
    assert (result - expected).abs().max() <= 1e-6
    for one in (result, expected):
        (one**2).sum().backward()
    for mine, theirs in ((output, x), (residual, r), (bias, b)):
        if mine is not bias or has_bias:
            assert (mine.grad - theirs.grad).abs().max() <= 1e-5
    with torch.no_grad():  # Megatron then works in place, on the output it is given
        kept = output.clone()
        torch.manual_seed(1)
        again = add((output, bias if has_bias else None), residual, dropout)
        assert (again - expected).abs().max() <= 1e-6
        assert torch.equal(output, kept)


# ---- whole trainings --------------------------------------------------------------------------

GROUPS = ("--untie-embeddings-and-output-weights", "--adam-eps", "1e-6", "--min-lr", "1e-4")
MUP = ("--mup-base-hidden-size", 16, "--mup-embedding-mult", 12, "--init-method-std", 0.1)
POWER_MUP = ("--power-mup-residual-multiplier", 0.22)
LADDER = ("--ladder-residual", "--ladder-layers", "1-3")
WIDTH = 4
"""64 over the base width of 16."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Run]:
    """A checkpoint of one iteration, the optimizer's groups, and the run."""
    folder = tmp_path_factory.mktemp("recorded")
    run, groups = record(folder, *MUP, *POWER_MUP, *LADDER, "--save", folder)
    return folder, groups, run


def record(folder: Path, *flags: object) -> tuple[Run, dict[str, Any]]:
    """Train one iteration with :data:`GROUPS` and ``flags``; the run, and what of its optimizer is
    of interest by parameter."""
    script, environment = HERE / "train_gpt_groups.py", {"GROUPS": str(folder / "groups.json")}
    run = train(*GROUPS, "--exit-interval", 1, *flags, script=script, environment=environment)
    return run, json.loads((folder / "groups.json").read_text())


def kind(name: str) -> str:
    """Class of a parameter in table 1."""
    if "embedding" in name or name.startswith("output_layer"):
        return "embedding or head"
    if name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
        return "hidden"
    return "projection" if name.endswith("linear_proj.weight") or "fc2.weight" in name else "vector"


def test_learning_rate_epsilon_and_decay(recorded: Any) -> None:
    """Hidden matrices at lr / m; biases, norms, embedding and head at lr; epsilon everywhere as it
    was given."""
    _, groups, _ = recorded
    assert {kind(name) for name in groups} == {
        "embedding or head",
        "hidden",
        "projection",
        "vector",
    }
    for name, group in groups.items():
        scale = WIDTH if kind(name) in ("hidden", "projection") else 1
        assert group["lr"] == pytest.approx(1e-3 / scale), name
        assert group["min_lr"] == pytest.approx(1e-4 / scale), name
        assert group["eps"] == 1e-6, name
        assert group["wd_mult"] == (0 if kind(name) == "vector" else 1), name


def test_torchs_groups_are_megatrons(recorded: Any) -> None:
    """Rate and weight decay of every parameter of the exported model are those of the parameter of
    Megatron's that it comes from."""
    folder, groups, _ = recorded
    checkpoint = Checkpoint(find_iteration(folder))
    config = decoder_config(checkpoint.args, 255, "float32")
    model = PluginDecoderForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in param_groups(model, 1e-3, config.logits_scaling, weight_decay=1)
        for parameter in group["params"]
    }
    for name, (key, row, *_) in HFTensors(checkpoint, config)._origin.items():
        source = key if row is None else key.replace("layers.", f"layers.{row}.")
        for fused, apart in UNFUSED_NORMS.items():  # the checkpoint's names are those of fused ones
            source = source.replace(fused, apart)
        theirs = groups[source]["lr"], groups[source]["wd_mult"]
        assert found.pop(name) == pytest.approx(theirs), name
    assert not found


def test_initial_values(recorded: Any) -> None:
    """std for embedding and head, / sqrt(m) for hidden matrices, / sqrt(2 L m) for projections."""
    _, groups, _ = recorded
    stds = {
        "embedding or head": 0.1,
        "hidden": 0.1 / WIDTH**0.5,
        "projection": 0.1 / (2 * LAYERS * WIDTH) ** 0.5,
    }
    for name, group in groups.items():
        if kind(name) != "vector":
            error = 4 / (2 * group["size"]) ** 0.5  # four sigma of a measured std
            assert group["std"] == pytest.approx(stds[kind(name)], rel=error), name


def test_what_upstreams_flag_does_alone(tmp_path: Path) -> None:
    """The same learning rates, also of the head, and an epsilon divided by m: off means off."""
    run, groups = record(tmp_path, "--use-mup", *MUP)
    assert "power-mup" not in run.output
    for name, group in groups.items():
        scale = WIDTH if kind(name) in ("hidden", "projection") else 1
        assert group["lr"] == pytest.approx(1e-3 / scale), name
        assert group["eps"] == pytest.approx(1e-6 / scale), name


def test_every_stage_multiplies_once_and_checkpoints_restore(recorded: Any) -> None:
    """From one checkpoint, without any flag but --use-checkpoint-args, and on two pipeline stages:
    a pending output that crosses stages is multiplied once."""
    folder, _, first = recorded
    line = (
        "power-mup: 4 of 4 layers, residual x 0.22, embedding x 12, attention x 0.0625, "
        "logits / 4, lr of hidden matrices / 4, init std 0.1\n"
    )
    assert line in first.output
    start = (*GROUPS, "--load", folder, "--exit-interval", 4)
    restored = train(*start, "--use-checkpoint-args")
    assert line in restored.output
    assert "Setting --power-mup --power-mup-residual-multiplier 0.22 --use-mup" in restored.output
    stages = ("--pipeline-model-parallel-size", 2)
    parallel = train(*start, *MUP, *POWER_MUP, *LADDER, *stages, processes=2)
    assert restored.losses.keys() == {2, 3, 4}
    assert parallel.losses == pytest.approx(restored.losses, rel=2e-5)
    assert parallel.grad_norms == pytest.approx(restored.grad_norms, rel=4e-4)


# ---- flags ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def parsed(parser: ArgumentParser, *flags: object) -> Namespace:
    return parser.parse_args([str(flag) for flag in flags])


def upstream(args: Namespace) -> tuple[Any, ...]:
    names = ("use_mup", "mup_base_hidden_size", "mup_embedding_mult", "init_method_std")
    return tuple(getattr(args, name) for name in names)


@pytest.mark.parametrize("preset", MUP_PRESETS)
def test_a_preset_sets_megatrons_arguments(parser: ArgumentParser, preset: str) -> None:
    args = parsed(parser, "--power-mup-preset", preset)
    assert args.power_mup
    assert upstream(args) == (True, 256, 12, 0.1)


def test_a_typed_flag_wins_even_at_its_default(parser: ArgumentParser) -> None:
    preset = ("--power-mup-preset", "1b")
    typed = ("--init-method-std=0.02", "--mup-embedding-mult", 1.0)
    assert upstream(parsed(parser, *preset, *typed)) == (True, 256, 1, 0.02)
    base = ("--mup-base-hidden-size", 128)
    assert upstream(parsed(parser, *base, *preset)) == (True, 128, 12, 0.1)


def test_without_a_preset_only_mup_is_turned_on(parser: ArgumentParser) -> None:
    assert upstream(parsed(parser)) == (False, None, 1, 0.02)
    assert upstream(parsed(parser, "--power-mup")) == (True, None, 1, 0.02)
    args = parsed(parser, "--power-mup-residual-multiplier", 0.5)
    assert upstream(args) == (True, None, 1, 0.02)


TYPED = {
    "--mtp-num-layers": ("--mtp-num-layers", "1"),
    "--hybrid-layer-pattern": ("--is-hybrid-model",),
    "--enable-mhc-connections": ("--enable-mhc-connections",),
    "--inference-fuse-tp-communication": ("--inference-fuse-tp-communication",),
    "--multi-latent-attention": ("--multi-latent-attention",),
    "--flash-decode": ("--flash-decode",),
    "--inference-dynamic-batching": ("--inference-dynamic-batching",),
    "--perform-rl-step": ("--perform-rl-step",),
}
SQRT = ("--mup-attn-scale-power", 0.5)


def test_the_table_is_covered() -> None:
    assert {row.flag for row in REFUSED} == TYPED.keys()


@pytest.mark.parametrize("flag", TYPED)
def test_refused(parser: ArgumentParser, flag: str) -> None:
    if TYPED[flag][0] not in parser.format_help():
        pytest.skip(f"this Megatron has no {TYPED[flag][0]}")
    with pytest.raises(ConfigError) as error:
        refuse(parsed(parser, "--power-mup", *TYPED[flag]), "--power-mup", REFUSED)
    assert f"--power-mup with {flag}: " in str(error.value)
    assert str(error.value).count("--power-mup with") == 1


def test_an_attention_over_the_square_root_is_allowed_where_that_is_asked_for(
    parser: ArgumentParser,
) -> None:
    refuse(parsed(parser, "--power-mup", "--flash-decode", *SQRT), "--power-mup", REFUSED)
    refuse(parsed(parser, "--power-mup"), "--power-mup", REFUSED)


def of_run(parser: ArgumentParser, *flags: object, finetune: bool = False) -> Namespace:
    args = parsed(parser, *flags, "--num-layers", 4, "--hidden-size", 1024)
    args.finetune, args.kv_channels = finetune, 64
    return args


def test_checkpoint_of_another_function_is_refused(
    parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = ("--power-mup-preset", "powerlm-3b")
    saved = of_run(parser, *preset)
    explicit = ("--mup-base-hidden-size", 256, "--mup-embedding-mult", 12)
    checkpoints.check(of_run(parser, *POWER_MUP, *explicit), saved, "folder")  # the same function
    for flags in (
        ("--use-mup", *explicit),
        (*preset, "--power-mup-residual-multiplier", 0.3),
        (*preset, "--mup-embedding-mult", 3),
        (*preset, *SQRT),
    ):
        message = r"--power-mup-preset powerlm-3b --use-mup --mup-base-hidden-size 256.*--finetune"
        with pytest.raises(ConfigError, match=message):
            checkpoints.check(of_run(parser, *flags), saved, "folder")
    assert capsys.readouterr().out == ""
    checkpoints.check(of_run(parser, finetune=True), saved, "folder")
    assert "retrain" in capsys.readouterr().out


# ---- layers -----------------------------------------------------------------------------------


def test_layers_without_an_addition_to_scale_are_refused() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp

    from megatron_plugins.power_mup import transform

    half = PowerMup(residual_multiplier=0.5)
    specs = transform([get_gpt_layer_local_spec()] * 2, None, half, 0)
    assert transform(specs, None, half, 0) == specs  # a second pass does not multiply again
    bare = get_gpt_layer_local_spec()
    bare.submodules.mlp_bda = IdentityFuncOp
    with pytest.raises(ConfigError, match=r"layer 3 has no bias-dropout-add .*mlp_bda.*IdentityF"):
        transform([bare], None, half, 3)


def test_presets() -> None:
    assert MUP_PRESETS["powerlm-3b"] == MupPreset(0.22, 12, 256, 0.1)
    assert PowerMup(preset="1b-moe").multiplier() == 0.28
    assert PowerMup(preset="1b-moe", residual_multiplier=0.3).multiplier() == 0.3
    assert PowerMup().multiplier() == 1
