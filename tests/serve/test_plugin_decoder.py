"""vLLM with the plugin against transformers: log-probabilities, greedy tokens, cache size."""

from __future__ import annotations

import pytest

from tests.serve.conftest import KV_BYTES
from tests.serve.families import FAMILIES, TOLERANCE
from torch_plugins.config import CrossLayerAttention

OURS = "torch_plugins.vllm.plugin_decoder"
STOCK = {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}


def distance(first, second):
    """Largest difference of log-probabilities, of any token at any place of any prompt."""
    return max(
        abs(x - y)
        for a, b in zip(first, second, strict=True)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def producers(config):
    layers = config["num_hidden_layers"]
    section = config.get("cross_layer_attention")
    if section is None:
        return layers
    return len(set(CrossLayerAttention.from_dict(section).resolve(layers)))


def blocks(config, layers, block_size, tensor_parallel=1):
    """Blocks that fit: ``2 * layers * heads * head_dim`` values of 4 bytes a token."""
    heads = max(1, config["num_key_value_heads"] // tensor_parallel)
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return KV_BYTES // (2 * layers * heads * head_dim * 4 * block_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_equals_transformers(served, reference, name):
    family, expected, result = FAMILIES[name], reference(name), served(name)
    tensor, pipeline = (
        family.options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")
    )
    model = [f"{OURS}.PluginDecoderForCausalLM", f"{OURS}.PluginDecoderModel"]
    if family.stock:
        module = f"vllm.model_executor.models.{STOCK[family.stock]}"
        model = [f"{module}.{family.stock}ForCausalLM", f"{module}.{family.stock}Model"]
    assert result["models"] == [model] * tensor * pipeline

    assert distance(result["logprobs"], expected["logprobs"]) <= TOLERANCE
    for control, logprobs in zip(family.controls, expected["controls"], strict=True):
        assert distance(result["logprobs"], logprobs) > TOLERANCE, control

    assert result["tokens"] == [expected["tokens"]] * 2
    assert result["cached"] > 0  # the second time from cached blocks

    layers = producers(family.config) // pipeline
    assert result["blocks"] == blocks(family.config, layers, result["block_size"], tensor)


def test_the_cache_holds_as_many_times_the_tokens_as_producers_are_fewer(served):
    plain, cla2, cla3 = (served(name) for name in ("llama", "cla2", "cla3-ladder"))
    assert cla2["blocks"] == 2 * plain["blocks"]
    assert cla3["blocks"] == plain["blocks"] * 4 // 3  # 3 producers of 7 layers, against 4 of 4


def test_without_the_plugin_the_tokens_are_the_same_and_nothing_is_saved(engine, reference):
    """vLLM's Transformers backend runs the code in the folder; every layer caches."""
    name = "cla3-ladder"
    expected, config = reference(name), FAMILIES[name].config
    result = engine(
        name,
        model_impl="transformers",
        trust_remote_code=True,
        environment={"VLLM_PLUGINS": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    ((outer, inner),) = result["models"]
    assert outer.endswith(".TransformersForCausalLM")
    assert inner.startswith("transformers_modules.")
    assert result["ours"] == []
    assert distance(result["logprobs"], expected["logprobs"]) <= TOLERANCE
    assert result["tokens"] == [expected["tokens"]] * 2
    layers = config["num_hidden_layers"]
    assert result["blocks"] == blocks(config, layers, result["block_size"])


def test_refusals_reach_the_user(engine):
    wrong = {
        "hidden_act 'relu' of a gated MLP": {"hf_overrides": {"hidden_act": "relu"}},
        "--kv-sharing-fast-prefill": {"kv_sharing_fast_prefill": True},
        "the checkpoint has model.layers.2.self_attn.": {
            "hf_overrides": {"cross_layer_attention": {"sharing_factor": 4}}
        },
        "the checkpoint lacks model.layers.1.self_attn.k_proj.weight": {
            "hf_overrides": {"cross_layer_attention": None}
        },
    }
    result = engine("cla2", refused=list(wrong.values()))
    for message, error in zip(wrong, result["errors"], strict=True):
        assert message in error


def test_a_pipeline_stage_that_splits_a_group_is_refused(engine):
    """vLLM raises in a worker, which prints the error."""
    result = engine(
        "cla2",
        refused=[{"pipeline_parallel_size": 2}],
        environment={"VLLM_PP_LAYER_PARTITION": "1,3"},
    )
    assert result["errors"] != [None]
    assert "a stage starts at layer 1, which shares the keys and values of layer 0" in result["log"]
    assert "set VLLM_PP_LAYER_PARTITION=2,2" in result["log"]
