"""W4A4 in folders of transformers: the marker, the quantizer behind it, and the naive decoder."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import validate_quantization_for_training

from tests.hf.conftest import TINY
from torch_plugins import reference
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.ops.dynamic_quant import fake_quant_rows
from torch_plugins.w4a4.linear import FakeQuantLinear, fake_quant_linears, swap
from torch_plugins.w4a4.quantizer import Mode, quantizers_of

FEATURE = W4A4(clip_init="1.5", kurtosis_weight=0, modules="*mlp*,!*layers.0*down_proj")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    swap(model, FEATURE)
    for number, quantizer in enumerate(quantizers_of(model).values()):
        torch.nn.init.constant_(quantizer.clip_high, 1 + number / 16)
    return model


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"use_safetensors": True}], ids=str)
def test_a_folder_comes_back_as_it_was(llama, folder, tokens, options, tmp_path):
    ids = tokens()
    again = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(again) is LlamaForCausalLM
    assert sorted(fake_quant_linears(again)) == sorted(fake_quant_linears(llama))
    assert len(fake_quant_linears(again)) == 11
    assert torch.equal(again(ids).logits, llama(ids).logits)
    again.save_pretrained(tmp_path / "again")
    files = (tmp_path / "again" / "config.json", folder / "config.json")
    markers = [json.loads(file.read_text())["quantization_config"] for file in files]
    assert markers[0] == markers[1]
    assert markers[0]["quant_method"] == "torch_plugins_w4a4"
    assert markers[0]["feature"] == FEATURE.to_dict()
    assert markers[0]["modules"] == sorted(fake_quant_linears(llama))


def test_a_loaded_model_is_one_that_trains(folder, tokens):
    """In the dtype asked for; nothing of transformers takes it for one that was quantized."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    validate_quantization_for_training(model)
    model.float()
    model(tokens(), labels=tokens()).loss.backward()
    for layer in fake_quant_linears(model).values():
        assert layer.weight.grad.any()
        assert layer.input_quantizer.clip_high.grad is not None
        assert layer.input_quantizer.mode is Mode.QUANTIZE


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        print("loaded")
    except Exception as error:
        print(error)
"""


def test_nothing_loads_where_our_package_is_off(folder, make_model, tmp_path):
    """Neither a stock model nor a decoder with its code."""
    decoder = make_model(ladder_residual={})
    swap(decoder, FEATURE)
    decoder.save_pretrained(tmp_path / "decoder")
    environment = {**os.environ, "TORCH_PLUGINS_DISABLE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "decoder")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    told = "W4A4 of torch_plugins: import torch_plugins.hf before loading"
    assert [told in line for line in done.stdout.splitlines()] == [True, True], done


WRONG = [
    ("unknown key 'module'; did you mean 'modules'", {"module": []}),
    ("feature 3: must be an object", {"feature": 3}),
    ("unknown key 'activation_bit'; did you mean", {"feature": {"activation_bit": 4}}),
    (r"modules \[\]: must be a list", {"modules": []}),
    (r"modules: model.layers.9.mlp is no linear layer", {"modules": ["model.layers.9.mlp"]}),
    ("modules: lm_head is no linear layer of this LlamaForCausalLM", {"modules": ["lm_head"]}),
]


@pytest.mark.parametrize(("message", "fields"), WRONG, ids=[str(fields) for _, fields in WRONG])
def test_wrong_markers(folder, message, fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_without_a_clip(folder):
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.2.mlp.up_proj.input_quantizer.clip_low"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{lost}: not in the folder, though quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_saved_before_clips_were_measured(llama, tmp_path, tokens):
    llama.model.layers[1].mlp.up_proj.input_quantizer.clip_high.data.zero_()
    llama.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="clips of 1 linear layers, such as model.layers.1.mlp.up"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(tokens()).logits.isfinite().all()
    assert {each.mode for each in quantizers_of(model).values()} == {Mode.OFF}


def test_swap_again(llama):
    """The same takes what else is new; another function is refused, and so is another method."""
    swap(llama, W4A4(kurtosis_weight=0.5, modules="*mlp*"))
    layers = fake_quant_linears(llama)
    assert len(layers) == 12
    assert {layer.kurtosis_loss.coefficient for layer in layers.values()} == {0.5}
    assert layers["model.layers.1.mlp.up_proj"].input_quantizer.clip_high > 1
    assert len(llama.config.quantization_config["modules"]) == 12
    for wrong in (W4A4(activation_bits=8), W4A4(symmetric=True), W4A4(weight_bits=4)):
        with pytest.raises(ConfigError, match="give the same bits, granularity and grid"):
            swap(llama, wrong)
    with pytest.raises(ConfigError, match=r"leaves out model.layers.0.mlp.down_proj"):
        swap(llama, FEATURE)
    other = LlamaForCausalLM(LlamaConfig(**TINY))
    other.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="quantization_config of another method"):
        swap(other, FEATURE)
    assert not fake_quant_linears(other)


CASES = [
    {},
    {"symmetric": True, "activation_bits": 3},
    {"weight_bits": 4, "weight_group_size": 8},
    {"weight_bits": 3, "activation_bits": 0},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_naive_decoder_quantizes_alike(make_model, tokens, fields):
    feature = W4A4(**{"clip_init": "1.5", "modules": "!*down_proj"} | fields)
    model = make_model(torch.float64, ladder_residual={}, attention_bias=True)
    plain = model(tokens()).logits
    swap(model, feature)
    wanted = model(tokens()).logits
    assert (wanted - plain).abs().max() > 0.1
    found = reference.logits(model.state_dict(), model.config.to_dict(), tokens())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_naive_decoder_rounds_tokens_alike():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    feature = W4A4(granularity="token", activation_bits=5)
    assert torch.equal(reference.quantized_input({}, "x", x, feature), fake_quant_rows(x, 5))


def test_the_naive_decoder_refuses(make_model, tokens):
    model = make_model()
    swap(model, FEATURE)
    state, config = model.state_dict(), model.config.to_dict()
    section = config["quantization_config"]

    def refused(message, state=state, **fields):
        with pytest.raises(ConfigError, match=message):
            reference.logits(state, config | fields, tokens())

    refused("quantization_config.modules does not name its layer", quantization_config=None)
    refused("unknown to the reference", quantization_config={"quant_method": "gptq"})
    refused("unknown to the reference", dense_moe={"num_experts": 2})
    fp4 = section["feature"] | {"grid": "nvfp4"}
    refused("grid 'nvfp4' is unknown", quantization_config=section | {"feature": fp4})


def test_dense_moe_is_refused(make_model, tmp_path):
    model = make_model(dense_moe={"num_experts": 2, "gated": True})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    section = {"quant_method": "torch_plugins_w4a4", "feature": {}, "modules": ["x"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    with pytest.raises(ConfigError, match="dense_moe: its experts are computed without their"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())
