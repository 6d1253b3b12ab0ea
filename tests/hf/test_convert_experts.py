"""Stock models are given experts of DS-MoE: with the dense model's function, or fresh ones."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hf.test_convert import FAMILIES, LADDER, SHARED, SIZES, build, step
from torch_plugins import reference
from torch_plugins.auxiliary_loss import Scope, bind
from torch_plugins.config import ConfigError, DenseMoE
from torch_plugins.hf.convert import convert

EXPERTS = DenseMoE(num_experts=4, attention_experts=2, gated=True, router_hidden_size=6)
LINEAR = DenseMoE(num_experts=5, gated=True, router="linear", mi_weight_mlp=0)
WITHOUT_BIASES = [name for name in FAMILIES if name not in ("llama-biases", "plugin_decoder")]


def experts_of(family):
    """With sharing and a ladder too; the decoder's MLP is not gated."""
    if family == "plugin_decoder":
        return [DenseMoE(num_experts=8, attention_experts=2, router_hidden_size=6)]
    return [EXPERTS, SHARED, LADDER] if family == "qwen3" else [EXPERTS]


@pytest.mark.parametrize("family", [*WITHOUT_BIASES, "plugin_decoder"])
def test_experts_that_are_blocks_start_with_the_dense_function(tokens, family):
    """All scores are 1 / N, and the last matrices N times as large."""
    model, ids = build(FAMILIES[family]), tokens()
    dense = copy.deepcopy(model)
    others = experts_of(family)[1:]
    if others:
        convert(dense, others)
    before = dict(model.named_parameters())
    result = convert(model, [*experts_of(family)])
    names = ["router.weight", "router.hidden.weight"]
    assert sorted(result.added) == sorted(
        f"model.layers.{layer}.{part}.{name}"
        for layer in range(4)
        for part in ("mlp", "self_attn")
        for name in names
    )
    for name, parameter in result.added.items():
        assert (parameter == 0).all() == name.endswith("router.weight")
        mlp = "self_attn" not in name
        like = name.split("router")[0] + ("up_proj.weight" if mlp else "q_proj.weight")
        assert result.likes[name] is before[like]
    for name in result.removed.keys() ^ before.keys():
        assert model.get_parameter(name) is before[name]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)

    bind(model, Scope())[0].scope.scale = 1.0
    first, second = step(model, ids)[1], step(dense, ids)[1]
    for name, gradient in second.items():
        factor = {"down": 8 if family == "plugin_decoder" else 4, "o_pr": 2}
        scale = next((n for part, n in factor.items() if f".{part}" in name), 1)
        torch.testing.assert_close(first[name] * scale, gradient, rtol=1e-4, atol=1e-5)
    assert all(
        (gradient.abs().sum() > 0) == name.endswith("router.weight")
        for name, gradient in first.items()
        if "router" in name
    )


def test_experts_of_any_number_start_with_the_dense_function(tokens):
    model, ids = build(FAMILIES["llama"], torch.float64), tokens()
    convert(model)  # the stock norms are in fp32
    expected = model(ids).logits
    convert(model, [LINEAR])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)
    assert not hasattr(model.model.layers[0].self_attn, "router")
    assert model.model.layers[0].mlp.router.loss is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "plugin_decoder"])
def test_fresh_experts_compute_the_reference(tokens, family):
    """What is not an expert stays; experts are as wide as those of a new model."""
    model, ids = build(FAMILIES[family], torch.float64).train(), tokens()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    convert(model, experts_of(family), expert_init="fresh")
    parameters = dict(model.named_parameters())
    drawn = ("gate_proj", "up_proj", "down_proj", "q_proj", "o_proj", "router")
    for name, parameter in parameters.items():
        if not any(part in name for part in drawn):
            assert torch.equal(parameter, state[name]), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            spread = 4 / math.sqrt(2 * parameter.numel())
            assert parameter.square().mean().sqrt().item() == pytest.approx(0.02, rel=spread), name
    expected = reference.logits(parameters, model.config.to_diff_dict(), ids)
    torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(parameters["model.layers.0.mlp.router.weight"], torch.zeros(()))


def test_a_decoder_takes_other_losses_and_rules_but_not_other_experts(tokens):
    model = build(FAMILIES["llama"])
    convert(model, [EXPERTS])
    state = dict(model.named_parameters())
    rule = {"inference": "top-k", "top_k": 2, "attention_inference": "threshold"}
    other = replace(EXPERTS, mi_weight_mlp=0.5, mi_weight_attention=0, **rule)
    model.model.norm.forward = model.model.norm.forward  # as an engine's hooks do
    result = convert(model, [other])
    assert not result.added
    assert all(state[name] is parameter for name, parameter in model.named_parameters())
    layer = model.model.layers[2]
    assert layer.mlp.router.loss.coefficient == 0.5
    assert layer.self_attn.router.loss is None
    assert layer.mlp.router.kept == (2, None)
    assert layer.self_attn.router.kept == (None, 0.48)
    assert model.config.experts == other
    del model.model.norm.forward
    convert(model, [LADDER])
    assert model.config.experts == other
    assert model.config.ladder_layers == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"has dense_moe \{.*convert the model that it was made"):
        convert(model, [replace(EXPERTS, num_experts=8)])


@pytest.mark.parametrize(
    ("family", "feature", "message"),
    [
        ("llama", replace(EXPERTS, num_experts=6), r"num_experts 6: must divide .*_size 40"),
        ("llama", replace(EXPERTS, gated=False), r"gated False: the model's MLP says True"),
        ("llama", replace(EXPERTS, attention_experts=3), r"has 2 query heads; use 2"),
        ("llama", replace(EXPERTS, ffn_hidden_size=8), r"experts of ffn_hidden_size 8: set"),
        ("llama-biases", LINEAR, r"num_experts 5: the model's MLP has biases \(mlp_bias\)"),
        ("llama-biases", replace(EXPERTS, num_experts=0), r"o_proj has a bias \(attention_bias\)"),
        ("multi-head", EXPERTS, r"attention_experts 2: a key-value head .* one query head; use 0"),
    ],
)
def test_experts_that_a_model_cannot_have(family, feature, message):
    multi_head = LlamaConfig(**SIZES | {"num_key_value_heads": 4})
    model = build(FAMILIES.get(family, multi_head))
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        convert(model, [feature, SHARED], kv_init="mean")
    assert type(model) is LlamaForCausalLM
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())
