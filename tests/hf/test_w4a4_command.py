"""The command that quantizes folders: resumption, refusals, and what a wrong folder meets."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf.w4a4_models import ASYMMETRIC, VOCAB, ids, llama, save
from torch_plugins.export.proof import VerificationError
from torch_plugins.w4a4 import quantize_folder as quantizing
from torch_plugins.w4a4.cli import main
from torch_plugins.w4a4.folder import Folder
from torch_plugins.w4a4.layers import decoder_layers
from torch_plugins.w4a4.quantize import Recipe
from torch_plugins.w4a4.quantize_folder import Job, quantize_folder
from torch_plugins.w4a4.state import State

GPTQ = Recipe("gptq", "learned")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    save(llama, None, work / "plain")
    save(llama, ASYMMETRIC, work / "clips")
    save_file({"input_ids": ids()}, work / "tokens.safetensors")
    return work


@pytest.fixture
def run(models, tmp_path, capsys):
    """The command on a model; what it prints, or its error."""

    def command(model, *options, output="out"):
        given = [str(option).format(models=models) for option in options]
        arguments = ["quantize", models / model, tmp_path / output, *given]
        try:
            main([str(argument) for argument in arguments])
        except SystemExit:
            return capsys.readouterr().err.strip().splitlines()[-1]
        return capsys.readouterr().out

    return command


CALIBRATION = ("--calibration", "{models}/tokens.safetensors", "--seq-length", 24)


def test_an_interrupted_run_goes_on_where_it_was(models, tmp_path, run):
    output, lines = tmp_path / "out", []

    def interrupt(line):
        lines.append(line)
        if line.startswith("layer 2"):
            raise KeyboardInterrupt

    job = Job(Folder(models / "clips"), output, GPTQ, ids())
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(job, interrupt)
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.quantizing"]

    other = run("clips", "--activations", "learned", "--group-size", 16, *CALIBRATION)
    assert "group_size was -1, not 16" in other
    assert "--restart" in other

    quantize_folder(job, lines.append)
    done = [line.split()[7].strip(",") for line in lines if line.startswith("layer")]
    assert done == ["quantized", "quantized", "resumed", "resumed", "quantized"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    text = run("clips", "--activations", "learned", *CALIBRATION, output="whole")
    assert "max abs difference" in text
    assert "ignores the activation bits" in text
    first, second = (load_file(tmp_path / p / "model.safetensors") for p in ("out", "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_go_to_the_device_and_back(models, tmp_path):
    """On the CPU under another name, which takes the same way as a GPU."""
    results = []
    for device in ("cpu", "cpu:0"):
        job = Job(Folder(models / "clips"), tmp_path / device, GPTQ, ids(), device=device)
        assert quantize_folder(job, lambda line: None).equal
        results.append(load_file(tmp_path / device / "model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_model_itself_is_not_written_over(run, models):
    given = ("--activations", "none", "--method", "rtn", "--force")
    assert "is the model itself" in run("plain", *given, output=models / "plain")
    assert (models / "plain/model.safetensors").exists()


def test_other_tokens_are_another_run(models, tmp_path):
    job = Job(Folder(models / "plain"), tmp_path / "out", Recipe("gptq", "none"), ids())
    State(job.output, quantizing.fingerprint(job))
    for other in (ids(seed=2), ids()[:-1]):
        changed = Job(job.source, job.output, job.recipe, other)
        with pytest.raises(ValueError, match="calibration was"):
            State(job.output, quantizing.fingerprint(changed))
    State(job.output, quantizing.fingerprint(job))


def spoil(name, change):
    """``write`` with a tensor changed afterwards."""
    plain = quantizing.write

    def write(folder, *args):
        plain(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        found = next(key for key in sorted(tensors) if key.endswith(name))
        tensors[found] = change(tensors[found])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return write


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight_packed", lambda words: words ^ 1),
        ("weight_scale", lambda scale: scale * 1.01),
        ("input_scale", lambda scale: scale * 1.1),
        ("input_zero_point", torch.round),
        ("layernorm.weight", lambda weight: weight * 1.01),
    ],
)
def test_a_folder_that_computes_something_else_does_not_stay(
    models, tmp_path, monkeypatch, name, change
):
    monkeypatch.setattr(quantizing, "write", spoil(name, change))
    job = Job(Folder(models / "clips"), tmp_path / "out", Recipe("rtn", "learned"))
    with pytest.raises(VerificationError, match="nothing is left"):
        quantize_folder(job, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_one_decoder_layer_is_in_memory(models, tmp_path):
    source = Folder(models / "plain")
    model = source.skeleton()
    _, layers = decoder_layers(model)
    seen = []

    def real(module):
        return sum(not parameter.is_meta for parameter in module.parameters())

    for layer in layers:
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda *_: seen.append([real(layer) > 0 for layer in layers])
        )
    job = Job(source, tmp_path / "out", Recipe("gptq", "none"), ids(4))
    state = State(job.output, {})
    quantizing.run(model, quantizing.input_quantizers(model, job), job, state, lambda line: None)
    assert {sum(one) for one in seen} == {1}
    assert [one.index(True) for one in seen] == sorted([0, 1, 2] * (len(seen) // 3))
    assert real(layers) == 0


def test_weights_only_leaves_no_mark_of_training(run, tmp_path):
    text = run("clips", "--activations", "none", "--method", "rtn", "--dtype", "bfloat16")
    assert "Activations are NOT quantized" in text
    assert "NOT quantized" in (tmp_path / "out/README.md").read_text()
    fields = json.loads((tmp_path / "out/config.json").read_text())
    (group,) = fields["quantization_config"]["config_groups"].values()
    assert group["input_activations"] is None
    assert fields["dtype"] == "bfloat16"
    assert "torch_plugins" not in json.dumps(fields)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert not [name for name in tensors if "input" in name and "layernorm" not in name]
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    packed = [tensor for name, tensor in tensors.items() if name.endswith("packed")]
    weights = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert sum(tensor.nbytes for tensor in packed) == weights / 2


REFUSED = {
    "has no clips": ("plain", "--activations", "learned", "--method", "rtn"),
    "method gptq needs tokens": ("plain", "--activations", "none"),
    "--method rtn uses no tokens": (
        *("plain", "--activations", "none", "--method", "rtn"),
        *CALIBRATION,
    ),
    "does not divide the 48 input features of model.layers.0.mlp.down_proj": (
        *("plain", "--activations", "none", "--method", "rtn", "--group-size", 32),
    ),
    "group_size 0: must be": (
        *("plain", "--activations", "none", "--method", "rtn", "--group-size", 0),
    ),
    "matches no linear layer": (
        *("plain", "--activations", "none", "--method", "rtn", "--modules", "*attn.x"),
    ),
    "no such file": ("plain", "--activations", "none", "--calibration", "nothing.txt"),
    "has no tokenizer": (
        *("plain", "--activations", "none", "--calibration", "{models}/plain/config.json"),
    ),
    "fewer than one sequence, --seq-length": (
        *("plain", "--activations", "none", "--tokens", 20, *CALIBRATION),
    ),
    "960 tokens, fewer than one sequence": (
        *("plain", "--activations", "none", "--seq-length", 1000, *CALIBRATION[:2]),
    ),
    "damping 0.0: must be": ("plain", "--activations", "none", "--damping", 0.0, *CALIBRATION),
    "no config.json": (".", "--activations", "none", "--method", "rtn"),
    "--max-shard-size big": (
        *("plain", "--activations", "none", "--method", "rtn", "--max-shard-size", "big"),
    ),
    "--device abacus": (
        *("plain", "--activations", "none", "--method", "rtn", "--device", "abacus"),
    ),
    "act_order: goes with": ("plain", "--activations", "none", "--method", "rtn", "--act-order"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(run, message, tmp_path):
    assert message in run(*REFUSED[message])
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_folder_is_not_quantized_again(run, models, tmp_path, capsys):
    run("plain", "--activations", "none", "--method", "rtn")
    for given, message in (([], "is there already"), (["--force"], "quantized already")):
        arguments = ["quantize", str(tmp_path / "out"), str(tmp_path / "out"), *given]
        with pytest.raises(SystemExit):
            main([*arguments, "--activations", "none", "--method", "rtn"])
        assert message in capsys.readouterr().err


def test_clips_that_were_never_measured_are_refused(run, models, tmp_path):
    tensors = load_file(models / "clips/model.safetensors")
    name = "model.layers.1.mlp.up_proj.input_quantizer.clip_"
    spoiled = {"high": 0.0, "low": 0.0}
    for path in (models / "clips").iterdir():
        (models / "zero").mkdir(exist_ok=True)
        (models / "zero" / path.name).write_bytes(path.read_bytes())
    tensors |= {name + which: torch.tensor([value]) for which, value in spoiled.items()}
    save_file(tensors, models / "zero/model.safetensors", metadata={"format": "pt"})
    text = run("zero", "--activations", "learned", "--method", "rtn")
    assert "clips of model.layers.1.mlp.up_proj are [0.0, 0.0]" in text


def test_text_is_calibrated_on_in_documents(models, tmp_path, run):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    folder = save(llama, None, tmp_path / "model")
    core = Tokenizer(parts.WordLevel({chr(65 + i): i for i in range(VOCAB)}, unk_token="A"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="A", eos_token="B").save_pretrained(
        folder
    )
    (tmp_path / "a.txt").write_text("CDEFGHIJ")
    (tmp_path / "a.jsonl").write_text('{"text": "CDE"}\n\n{"text": "FG"}\n')
    read = lambda file, tokens=8: quantizing_tokens(tmp_path / file, folder, tokens)  # noqa: E731
    assert read("a.txt").tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert read("a.jsonl").tolist() == [[2, 3, 4, 1]]
    (tmp_path / "b.jsonl").write_text('{"text": "CDE"}\n{"words": 1}\n')
    with pytest.raises(ValueError, match='line 2 is no object with a "text"'):
        read("b.jsonl")
    save_file({"input_ids": torch.tensor([[1, 2, 3, VOCAB]])}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=f"token {VOCAB} is not in the model's vocabulary"):
        read("c.safetensors")


def quantizing_tokens(file, folder, tokens):
    from torch_plugins.w4a4.calibration import read_tokens

    return read_tokens(file, folder, Folder(folder).config, tokens, 4)
