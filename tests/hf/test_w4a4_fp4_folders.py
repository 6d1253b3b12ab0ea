"""FP4 folders as stock transformers loads them, and what the commands say of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.hf.w4a4_models import SMALL, granite, llama, plugin, save
from torch_plugins.config import ConfigError
from torch_plugins.export.proof import VerificationError, random_ids
from torch_plugins.ops.dynamic_quant import fake_quant_fp4
from torch_plugins.w4a4 import load_quantized
from torch_plugins.w4a4 import quantize_folder as quantizing
from torch_plugins.w4a4.activations import BlockInput
from torch_plugins.w4a4.cli import main
from torch_plugins.w4a4.folder import Folder
from torch_plugins.w4a4.quantize import Recipe, quantize_model
from torch_plugins.w4a4.quantize_folder import Job, quantize_folder

GRIDS = {"mxfp4": 32, "nvfp4": 16}
CASES = {
    "mxfp4": Recipe("rtn", "none", weights="mxfp4"),
    "mxfp4, inputs too": Recipe("rtn", "dynamic-block", 32, weights="mxfp4"),
    "nvfp4": Recipe("rtn", "none", 16, weights="nvfp4"),
    "nvfp4, not all": Recipe("rtn", "none", modules="*,!*k_proj", weights="nvfp4"),
}


def wide():
    """Features in whole blocks of 32, an odd number of them in one layer."""
    fields = SMALL | {"hidden_size": 64, "intermediate_size": 96}
    return LlamaForCausalLM(LlamaConfig(**fields, attention_bias=True)).bfloat16()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    save(wide, None, work / "wide")
    save(llama, None, work / "fp32")
    save(granite, None, work / "granite")
    return work


@pytest.fixture(scope="module")
def quantized(models, tmp_path_factory):
    """Each case's folder, with what the command proved of it."""
    work, made = tmp_path_factory.mktemp("quantized"), {}

    def make(name):
        if name not in made:
            output = work / str(len(made))
            job = Job(Folder(models / "wide"), output, CASES[name])
            made[name] = output, quantize_folder(job, lambda line: None)
        return made[name]

    return make


def expected_weights(folder, recipe):
    """By fake quantization; nvfp4 with the largest weight of what servers fuse."""
    source = load_file(folder / "model.safetensors")
    names = [n for n in source if n.endswith("_proj.weight")]
    names = [n for n in names if "!" not in recipe.modules or "k_proj" not in n]
    found = {}
    for name in names:
        parent, last, _ = name.rsplit(".", 2)
        fused = next(
            (f for f in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if last in f),
            (last,),
        )
        parts = [source[n] for f in fused if (n := f"{parent}.{f}.weight") in names]
        largest = max(part.float().abs().max() for part in parts)
        found[name] = fake_quant_fp4(source[name], recipe.weights, largest)
    return found


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_loads_and_computes_it(quantized, models, name):
    recipe, (output, verdict) = CASES[name], quantized(name)
    assert verdict.equal
    expected = expected_weights(models / "wide", recipe)
    model = AutoModelForCausalLM.from_pretrained(output)  # bfloat16, as the folder says
    tokens = random_ids(model.config)
    with torch.no_grad():
        narrow = model(input_ids=tokens).logits
        assert narrow.dtype == torch.bfloat16
        for key, weight in expected.items():
            assert torch.equal(model.get_parameter(key), weight), key
        torch.nn.Module.float(model)
        found = model(input_ids=tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(models / "wide", dtype=torch.float32)
        unquantized = plain(input_ids=tokens).logits
        for key, weight in expected.items():
            plain.get_parameter(key).data = weight.float()
        weights_only = plain(input_ids=tokens).logits
        for key in expected:
            if recipe.activations == "dynamic-block":
                plain.get_submodule(key.removesuffix(".weight")).register_forward_pre_hook(
                    lambda _, args: (BlockInput()(args[0]),)
                )
        fake = plain(input_ids=tokens).logits
    bound = 1e-5 * fake.abs().max()
    assert (found - fake).abs().max() <= bound
    assert (found - unquantized).abs().max() > 1000 * bound
    if recipe.activations != "none":
        assert (found - weights_only).abs().max() > 1000 * bound


def test_it_loads_where_this_package_is_not_imported(quantized):
    output, _ = quantized("mxfp4, inputs too")
    code = (
        "import sys; sys.modules['torch_plugins.w4a4'] = sys.modules['torch_plugins.ops'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(output)!r}); print(m(torch.ones(1, 3).long()).logits.sum())"
    )
    environment = os.environ | {"TORCH_PLUGINS_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nan" not in done.stdout


def test_files_are_those_of_the_format(quantized):
    for name, (part, dtype) in {
        "mxfp4": ("weight_scale", torch.uint8),
        "nvfp4": ("weight_scale", torch.float8_e4m3fn),
    }.items():
        output, _ = quantized(name)
        fields = json.loads((output / "config.json").read_text())["quantization_config"]
        preset = preset_name_to_scheme(f"{name.upper()}A16", ["Linear"])
        found = QuantizationScheme(**fields["config_groups"]["group_0"])
        assert found.weights.model_dump() == preset.weights.model_dump()
        assert found.format == fields["format"] == f"{name}-pack-quantized"
        tensors = load_file(output / "model.safetensors")
        linear = "model.layers.1.mlp.down_proj."
        assert tensors[linear + part].dtype == dtype
        assert tensors[linear + part].shape == (64, 96 // GRIDS[name])
        assert tensors[linear + "weight_packed"].shape == (64, 48)
        assert linear + "weight_shape" not in tensors
        assert (linear + "weight_global_scale" in tensors) == (name == "nvfp4")
        text = (output / "README.md").read_text()
        assert f"compressed-tensors, {name}-pack-quantized" in text
        assert "NOT quantized" in text
        assert ("its kernel decides" in text) == (name == "mxfp4")


def test_layers_that_servers_fuse_share_the_scale_of_the_whole(quantized):
    tensors = load_file(quantized("nvfp4")[0] / "model.safetensors")
    whole = {n.split(".", 2)[2]: t.item() for n, t in tensors.items() if "global" in n}
    one = [{whole[f"{i}.self_attn.{k}_proj.weight_global_scale"] for k in "qkv"} for i in range(3)]
    one += [
        {whole[f"{i}.mlp.{k}_proj.weight_global_scale"] for k in ("gate", "up")} for i in range(3)
    ]
    assert [len(each) for each in one] == [1] * 6
    assert len(set.union(*one)) > 1


@pytest.mark.parametrize("weights", GRIDS)
def test_in_memory_it_is_the_same(quantized, models, weights):
    model = AutoModelForCausalLM.from_pretrained(models / "wide")
    quantize_model(model, method="rtn", weights=weights)
    for key, weight in expected_weights(models / "wide", CASES[weights]).items():
        assert torch.equal(model.get_parameter(key), weight), key
    with pytest.raises(ConfigError, match="dynamic-block: of folders only"):
        quantize_model(model, method="rtn", weights="mxfp4", activations="dynamic-block")


def test_models_with_code_of_their_own(tmp_path):
    save(plugin, None, tmp_path / "plugin")
    recipe = Recipe("rtn", "none", weights="nvfp4")
    job = Job(Folder(tmp_path / "plugin"), tmp_path / "out", recipe, dtype=torch.bfloat16)
    assert quantize_folder(job, lambda line: None).equal


SPOILED = {
    "weight_packed": lambda packed: packed ^ 1,
    "weight_scale": lambda scale: (scale.view(torch.uint8) + 1).view(scale.dtype),
    "weight_global_scale": lambda whole: whole * 1.01,
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_folder_that_computes_something_else_does_not_stay(models, tmp_path, monkeypatch, name):
    plain = quantizing.write

    def write(folder, *args):
        plain(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        found = next(key for key in sorted(tensors) if key.endswith(name))
        tensors[found] = SPOILED[name](tensors[found])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(quantizing, "write", write)
    job = Job(Folder(models / "wide"), tmp_path / "out", CASES["nvfp4"])
    with pytest.raises(VerificationError, match="nothing is left"):
        quantize_folder(job, lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(models, tmp_path, capsys):
    """The command on a model; what it prints, or its error."""

    def command(model, *options):
        given = ["quantize", models / model, tmp_path / "out", *options]
        try:
            main([str(argument) for argument in given])
        except SystemExit:
            return " ".join(capsys.readouterr().err.split())
        return capsys.readouterr().out

    return command


MX, NV = ("--weights", "mxfp4", "--method", "rtn"), ("--weights", "nvfp4", "--method", "rtn")
REFUSED = {
    "--method gptq: makes integers only; --weights mxfp4 needs --method rtn": (
        *("wide", "--weights", "mxfp4", "--activations", "none"),
    ),
    "--group-size 16: --weights mxfp4 has blocks of 32; leave it out": (
        *("wide", *MX, "--activations", "none", "--group-size", 16),
    ),
    "--group-size 32: --weights nvfp4 has blocks of 16; leave it out": (
        *("wide", *NV, "--activations", "none", "--group-size", 32),
    ),
    "--activations learned: integers, which nothing multiplies with --weights mxfp4; give none, or "
    "dynamic-block": ("wide", *MX, "--activations", "learned"),
    "--activations dynamic-token: integers, which nothing multiplies with --weights nvfp4; give "
    "none": ("wide", *NV, "--activations", "dynamic-token"),
    "--activations dynamic-block: with --weights nvfp4, inputs need": (
        *("wide", *NV, "--activations", "dynamic-block"),
    ),
    "--activations dynamic-block: goes with --weights mxfp4; give dynamic-token": (
        *("wide", "--method", "rtn", "--activations", "dynamic-block"),
    ),
    "--weights mxfp4: its blocks of 32 do not divide the 48 input features of "
    "model.layers.0.mlp.down_proj; exclude it with --modules '!model.layers.0.mlp.down_proj'": (
        *("granite", *MX, "--activations", "none"),
    ),
    "is float32, but transformers unpacks FP4 to bfloat16; give --dtype bfloat16": (
        *("fp32", *NV, "--activations", "none"),
    ),
    "--dtype is float16, but transformers unpacks FP4 to bfloat16": (
        *("wide", *NV, "--activations", "none", "--dtype", "float16"),
    ),
    "--method rtn uses no tokens": (
        *("wide", *NV, "--activations", "none", "--calibration", "x.jsonl"),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(run, message, tmp_path):
    assert message in run(*REFUSED[message])
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_the_remedy_for_other_dtypes(run, tmp_path):
    text = run("fp32", *NV, "--activations", "none", "--dtype", "bfloat16")
    assert "max abs difference" in text
    assert "NOT quantized" in text
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert out(torch.ones(1, 2).long()).logits.dtype == torch.bfloat16


def test_an_interrupted_run_goes_on_with_the_same_weights_only(models, tmp_path, run):
    lines = []

    def interrupt(line):
        lines.append(line)
        if line.startswith("layer 2"):
            raise KeyboardInterrupt

    job = Job(Folder(models / "wide"), tmp_path / "out", CASES["mxfp4"])
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(job, interrupt)
    other = run("wide", *NV, "--activations", "none")
    assert "weights was mxfp4, not nvfp4" in other
    assert "--restart" in other
    quantize_folder(job, lines.append)
    done = [line.split()[7].strip(",") for line in lines if line.startswith("layer")]
    assert done == ["quantized", "quantized", "resumed", "resumed", "quantized"]
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(Job(job.source, tmp_path / "b", CASES["mxfp4"]), interrupt)
    again = Job(job.source, tmp_path / "b", CASES["nvfp4"], restart=True)
    assert quantize_folder(again, lambda line: None).equal


def test_packed_models_of_ours_refuse_it(quantized):
    output, _ = quantized("nvfp4")
    with pytest.raises(ConfigError, match=r"weights are nvfp4-pack-quantized.*with transformers"):
        load_quantized(output)


@pytest.mark.parametrize("name", ["mxfp4, inputs too", "nvfp4, not all"])
def test_the_report_reads_it(quantized, models, name):
    recipe, (output, _) = CASES[name], quantized(name)
    given = ["report", models / "wide", "--against", output, "--json", "--tokens", 64]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(argument) for argument in given])
    rows = {row["layer"]: row["errors"] for row in json.loads(out.getvalue())["layers"]}
    source = load_file(models / "wide/model.safetensors")
    expected = expected_weights(models / "wide", recipe)
    for linear, errors in rows.items():
        key = f"{linear}.weight"
        plain, error = source[key].float(), errors["quantized"]
        share = ((expected.get(key, plain) - plain).norm() / plain.norm()).item()
        assert error["weights"] == pytest.approx(share, rel=1e-4)
        assert (error["inputs"] > 0.01) == (recipe.activations != "none")
    assert expected.keys() <= {f"{linear}.weight" for linear in rows}


def test_the_report_refuses_inputs_of_others(quantized, models, tmp_path, capsys):
    output, _ = quantized("nvfp4")
    for path in output.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / "config.json").read_text())
    group = fields["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = group["weights"] | {"dynamic": "local"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SystemExit):
        main(["report", str(models / "wide"), "--against", str(tmp_path), "--tokens", "64"])
    assert "quantized in another way" in capsys.readouterr().err
