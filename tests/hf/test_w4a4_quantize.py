"""Quantized folders as users load them, against the model in memory that they were made of."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hf.w4a4_models import ASYMMETRIC, SYMMETRIC, granite, ids, llama, plugin, save
from torch_plugins.config import ConfigError
from torch_plugins.export.proof import random_ids
from torch_plugins.native import active
from torch_plugins.ops.prepacked import prepacked_bytes
from torch_plugins.w4a4 import W4A4Linear, load_quantized
from torch_plugins.w4a4.folder import Folder
from torch_plugins.w4a4.linear import FakeQuantLinear, swap
from torch_plugins.w4a4.quantize import Recipe, quantize_model
from torch_plugins.w4a4.quantize_folder import Job, quantize_folder
from torch_plugins.w4a4.quantizer import Mode, quantizers_of, set_mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models, one for each constructor and W4A4 that is asked for."""
    work, made = tmp_path_factory.mktemp("models"), {}

    def make(build, feature=None):
        key = build.__name__, str(feature)
        if key not in made:
            made[key] = save(build, feature, work / str(len(made)))
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


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][2].method == "rtn"])
def test_codes_are_the_nearest_with_the_scales_that_are_stored(quantized, folder, name):
    build, feature, _, dtype = CASES[name]
    output, _ = quantized(name)
    source, stored = (load_file(f / "model.safetensors") for f in (folder(build, feature), output))
    for linear, weight in naive_weights(output).items():
        scale = stored[f"{linear}.weight_scale"].float()
        wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        plain = source[f"{linear}.weight"]
        plain = (plain if dtype is None else plain.to(dtype)).float()
        nearest = (plain / wide).round().clamp(-8, 7) * wide.double()
        assert torch.equal(weight, nearest), linear


@pytest.mark.parametrize("name", CASES)
def test_packed_weights_compute_the_same_in_half_a_byte_each(quantized, name):
    output, _ = quantized(name)
    stock = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    model = load_quantized(output, dtype=torch.float32)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, W4A4Linear)}
    assert packed.keys() == naive_weights(output).keys()
    seen = {}
    for linear in packed:
        stock.get_submodule(linear).register_forward_hook(
            lambda _, args, out, linear=linear: seen.update({linear: (args[0], out)})
        )
    tokens = random_ids(model.config)
    with torch.no_grad():
        expected, found = (m(input_ids=tokens).logits for m in (stock, model))
    # Per token, the largest feature lies half way between two codes, and the last place decides.
    if CASES[name][2].activations != "dynamic-token":
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for linear, (x, out) in seen.items():
        assert (packed[linear](x) - out).abs().max() <= 1e-5 * out.abs().max(), linear
    for linear in packed.values():
        half_bytes = linear.in_features * linear.out_features / 2
        if linear.prepacked is None:
            assert linear.weight_packed.nbytes == half_bytes
        else:  # scales and sums too, and blocks of 16 rows and steps of 8 features filled up
            assert active("cpu")
            sizes = (linear.out_features, linear.in_features, linear.groups)
            assert half_bytes <= linear.prepacked.nbytes == prepacked_bytes(*sizes)
        assert not list(linear.parameters())
    narrow = load_quantized(output, dtype=torch.bfloat16).generate(tokens[:1, :4], max_new_tokens=2)
    assert narrow.shape == (1, 6)
    with pytest.raises(ConfigError, match="copy the folder"):
        model.save_pretrained(output)


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
        assert same.double().mean() >= (0.95 if recipe.method == "gptq" else 1), linear
