"""Quantized folders as users load them, against the model in memory that they were made of."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import torch_plugins.hf
from torch_plugins.config import W4A4
from torch_plugins.export.proof import random_ids
from torch_plugins.w4a4.folder import Folder
from torch_plugins.w4a4.linear import FakeQuantLinear, swap
from torch_plugins.w4a4.quantize import Recipe, quantize_model
from torch_plugins.w4a4.quantize_folder import Job, quantize_folder
from torch_plugins.w4a4.quantizer import Mode, quantizers_of, set_mode

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ASYMMETRIC = W4A4(clip_init="1.0", kurtosis_weight=0.0)
SYMMETRIC = W4A4(clip_init="1.0", symmetric=True, kurtosis_weight=0.0, modules="*mlp*,*_proj")


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True))


def granite():
    fields = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
    config = GraniteConfig(**SMALL, **fields, tie_word_embeddings=True, attention_multiplier=0.3)
    return GraniteForCausalLM(config).bfloat16()


def plugin():
    config = torch_plugins.hf.PluginDecoderConfig(
        **SMALL | {"num_hidden_layers": 4},
        ladder_residual={"layers": "1-3"},
        cross_layer_attention={"sharing_factor": 2},
    )
    return torch_plugins.hf.PluginDecoderForCausalLM(config)


def ids(count=40, length=24, seed=1):
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models, one for each constructor and W4A4 that is asked for."""
    work, made = tmp_path_factory.mktemp("models"), {}

    def make(build, feature=None):
        key = build.__name__, str(feature)
        if key not in made:
            torch.manual_seed(0)
            model = build()
            for name, parameter in model.named_parameters():
                spread = 0.2 if parameter.ndim == 1 else 0.3
                parameter.data.normal_(1.0 if "norm" in name else 0.0, spread)
            if feature is not None:
                swap(model, feature)
            for quantizer in quantizers_of(model).values():
                for clip in quantizer.parameters():
                    clip.data *= 1 + torch.rand(1).to(clip.dtype)  # each its own
            made[key] = work / str(len(made))
            model.save_pretrained(made[key])
        return made[key]

    return make


CASES = {
    "llama, learned, GPTQ": (llama, ASYMMETRIC, Recipe("gptq", "learned"), None),
    "llama, learned, groups, bf16": (
        llama,
        ASYMMETRIC,
        Recipe("rtn", "learned", 16),
        torch.bfloat16,
    ),
    "granite, symmetric": (granite, SYMMETRIC, Recipe("gptq", "learned", 16), None),
    "granite, weights only": (granite, SYMMETRIC, Recipe("rtn", "none"), None),
    "llama, tokens": (
        llama,
        None,
        Recipe("gptq", "dynamic-token", 8, act_order=True, modules="*,!*o_proj"),
        None,
    ),
    "ladder and shared keys, in the folder's own code": (
        plugin,
        ASYMMETRIC,
        Recipe("gptq", "learned"),
        None,
    ),
}


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """Each case's folder, with what the command proved of it."""
    work, made = tmp_path_factory.mktemp("quantized"), {}

    def make(name):
        if name not in made:
            build, feature, recipe, dtype = CASES[name]
            tokens = ids() if recipe.method == "gptq" else None
            output = work / str(len(made))
            job = Job(Folder(folder(build, feature)), output, recipe, tokens, dtype)
            made[name] = output, quantize_folder(job, lambda line: None)
        return made[name]

    return make


def naive_weights(output):
    """``code * scale`` of each packed weight, in fp64."""
    tensors = load_file(output / "model.safetensors")
    found = {}
    for name, words in tensors.items():
        linear, _, part = name.rpartition(".")
        if part == "weight_packed":
            codes = torch.stack([(words >> 4 * place & 15) - 8 for place in range(8)], -1)
            rows, columns = tensors[f"{linear}.weight_shape"].tolist()
            scale = tensors[f"{linear}.weight_scale"].double()
            codes = codes.flatten(1)[:rows, :columns]
            found[linear] = codes * scale.repeat_interleave(columns // scale.shape[1], 1)
    return found


def naive(source, output, recipe, dtype):
    """The quantized model in fp64, its inputs quantized as in training."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    if recipe.activations == "none":
        set_mode(quantizers_of(model).values(), Mode.OFF)
    if recipe.activations == "dynamic-token":
        swap(model, recipe.feature)
    for name, parameter in model.named_parameters():
        if dtype is not None and "clip" not in name:
            parameter.data = parameter.data.to(dtype).double()
    weights = naive_weights(output)
    assert weights.keys() == {n for n, _ in model.named_modules() if quantizes(n, recipe)}
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return model.eval()


def quantizes(name, recipe):
    return name.endswith("_proj") and not ("!" in recipe.modules and "o_proj" in name)


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_the_quantized_model(quantized, folder, name):
    build, feature, recipe, dtype = CASES[name]
    output, verdict = quantized(name)
    assert verdict.equal
    model = naive(folder(build, feature), output, recipe, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64)
    assert not any(isinstance(module, FakeQuantLinear) for module in loaded.modules())
    tokens = random_ids(model.config)
    with torch.no_grad():
        expected, found = (m(input_ids=tokens).logits for m in (model, loaded))
        set_mode(quantizers_of(model).values(), Mode.OFF)
        unquantized = model(input_ids=tokens).logits
    bound = 1e-5 * expected.abs().max()  # scales of inputs are stored in fp32
    assert (found - expected).abs().max() <= bound
    if recipe.activations != "none":
        assert (found - unquantized).abs().max() > 1000 * bound


@pytest.mark.parametrize("name", [n for n in CASES if "granite" not in n and "bf16" not in n])
def test_codes_are_those_of_the_model_in_memory(quantized, folder, name):
    """Rounding of inputs may differ in the last place, and so a code of GPTQ here and there."""
    build, feature, recipe, _ = CASES[name]
    output, _ = quantized(name)
    model = AutoModelForCausalLM.from_pretrained(folder(build, feature), dtype=torch.float32)
    tokens = ids() if recipe.method == "gptq" else None
    done = quantize_model(model, tokens, **vars(recipe))
    stored = naive_weights(output)
    assert done.keys() == stored.keys()
    for linear, weight in done.items():
        same = (weight.dequantize() - stored[linear]).abs() < 1e-6
        assert same.double().mean() >= (0.98 if recipe.method == "gptq" else 1), linear
