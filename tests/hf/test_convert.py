"""Stock models become the decoder in place, with its features or the same to the bit without."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from torch_plugins import reference
from torch_plugins.config import ConfigError, CrossLayerAttention, LadderResidual
from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM
from torch_plugins.hf.convert import convert

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-3.2": LlamaConfig(
        **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=10, rms_norm_eps=1e-3
    ),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=8),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "granite": GraniteConfig(
        **SIZES,
        tie_word_embeddings=True,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=4.0,
    ),
    "plugin_decoder": PluginDecoderConfig(**SIZES, normalization="layernorm", mlp_gated=False),
}
LADDER = LadderResidual("last:3")
SHARED = CrossLayerAttention(pattern="0,0,2,2")
SEPARATE = CrossLayerAttention(sharing_factor=3, kv_norm="separate")


def build(config, dtype=torch.float32):
    """With large random weights, biases and norms too, so that errors show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def step(model, ids):
    """Logits and gradients."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_features_logits_and_gradients_are_the_same_bits(tokens, family, implementation):
    model, ids = build(FAMILIES[family]), tokens()
    model.set_attn_implementation(implementation)
    logits, gradients = step(model, ids)
    random = torch.get_rng_state()
    result = convert(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model) is PluginDecoderForCausalLM
    assert not result.removed
    assert not result.added
    found, found_gradients = step(model, ids)
    assert torch.equal(found, logits)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(found_gradients[name], gradient), name


@pytest.mark.parametrize("features", [[LADDER], [SHARED], [SEPARATE, LADDER]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_compute_the_reference(tokens, family, features):
    model, ids = build(FAMILIES[family], torch.float64), tokens()
    before = dict(model.named_parameters())
    result = convert(model, features)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == before.keys() - result.removed.keys() | result.added.keys()
    for name, parameter in result.removed.items():
        assert parameter is before[name]
    for name in parameters.keys() & before.keys():
        assert parameters[name] is before[name], name

    expected = reference.logits(parameters, model.config.to_diff_dict(), ids)
    got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view_as(got)
    want = torch.autograd.grad(expected, list(parameters.values()), upstream)
    have = torch.autograd.grad(got, list(parameters.values()), upstream)
    for name, a, b in zip(parameters, have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_what_cross_layer_attention_removes_and_adds():
    model = build(FAMILIES["qwen3"])
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    result = convert(model, [SEPARATE])  # producers 0 and 1: the short group is the first
    gone = ("k_norm.weight", "k_proj.weight", "v_proj.weight")
    assert sorted(result.removed) == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (2, 3) for name in gone
    ]
    assert sorted(result.added) == [
        f"model.layers.{layer}.self_attn.kv_norm.weight" for layer in (0, 1)
    ]
    for name, parameter in result.added.items():
        like = model.get_parameter(name.replace("self_attn.kv_norm", "input_layernorm"))
        assert result.likes[name] is like
        assert parameter is not like
        assert torch.equal(parameter, like)
        assert parameter.requires_grad == like.requires_grad
    assert not hasattr(model.model.layers[2].self_attn, "k_proj")


def test_producers_start_with_their_own_keys_and_values_or_the_mean_of_their_group():
    stock = build(FAMILIES["qwen3"])
    own, mean = copy.deepcopy(stock), copy.deepcopy(stock)
    convert(own, [SEPARATE])
    convert(mean, [SEPARATE], kv_init="mean")
    state = stock.state_dict()
    for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
        one, *group = (state[f"model.layers.{layer}.self_attn.{name}"] for layer in range(4))
        average = torch.stack(group).mean(0)
        for model, expected in ((own, [one, group[0]]), (mean, [one, average])):
            for layer in (0, 1):
                found = model.get_parameter(f"model.layers.{layer}.self_attn.{name}")
                torch.testing.assert_close(found.detach(), expected[layer])
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(mean.get_parameter(query), state[query])


def test_what_a_script_holds_sees_the_conversion(tokens):
    model, ids = build(FAMILIES["llama"]).train(), tokens()
    layer, config = model.model.layers[1], model.config
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.generation_config.max_new_tokens = 3
    model.config.use_cache = False
    model.config.note_of_the_user = "kept"
    model.lm_head.weight.requires_grad_(False)
    calls = []
    layer.self_attn.register_forward_hook(lambda *_: calls.append("hook"))
    result = convert(model, [LADDER])

    assert model.model.layers[1] is layer
    assert layer.ladder
    assert layer.gradient_checkpointing
    assert model.is_gradient_checkpointing
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert not model.config.use_cache
    assert model.config.note_of_the_user == "kept"
    assert model.config is layer.self_attn.config is result.config
    assert config.model_type == "llama"  # it may belong to another model too
    weight = layer.mlp.up_proj.weight.detach().clone()
    model(ids, labels=ids).loss.backward()
    assert calls == ["hook", "hook"]  # once more for the recomputation
    optimizer.step()
    assert not torch.equal(layer.mlp.up_proj.weight, weight)
    model.eval()
    assert model.generate(ids, do_sample=False).shape == (2, 10)
    assert model.get_input_embeddings() is model.model.embed_tokens
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_forward_wrapped_by_a_trainer_runs_the_converted_decoder(tokens, family):
    """As TRL wraps that of its models, before the engine is built."""
    model, ids = build(FAMILIES[family]), tokens()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    convert(model, [LADDER, SHARED])
    wrapped = model(ids, labels=ids)
    del model.forward
    own = model(ids, labels=ids)
    assert torch.equal(wrapped.logits, own.logits)
    assert torch.equal(wrapped.loss, own.loss)


@pytest.mark.parametrize("family", ["llama-3.2", "qwen2", "granite"])
def test_saved_and_loaded_it_computes_the_same(tokens, tmp_path, family):
    build(FAMILIES[family]).save_pretrained(tmp_path / "stock")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    convert(model, [LADDER, SEPARATE])
    assert model.config.model_type == "plugin_decoder"
    model.save_pretrained(tmp_path / "converted")
    assert (tmp_path / "converted" / "modeling_plugin_decoder.py").is_file()
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(report.values())
    assert type(again) is PluginDecoderForCausalLM
    assert again.config.architectures == ["PluginDecoderForCausalLM"]
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)


def test_a_second_conversion_changes_nothing(tokens):
    model = build(FAMILIES["qwen2"])
    convert(model, [LADDER, SHARED])
    state, config = dict(model.named_parameters()), model.config
    model.model.layers[0].forward = model.model.layers[0].forward  # as an engine's hooks do
    result = convert(model, [LADDER, CrossLayerAttention(sharing_factor=2)])
    assert not result.removed
    assert not result.added
    assert model.config is config
    assert all(state[name] is parameter for name, parameter in model.named_parameters())


def test_a_decoder_may_change_its_ladder_but_not_its_sharing(tokens):
    model = build(FAMILIES["plugin_decoder"])
    convert(model, [SHARED])
    convert(model, [LADDER])
    assert model.config.ladder_layers == (1, 2, 3)
    assert model.config.kv_producers == (0, 0, 2, 2)
    with pytest.raises(ConfigError, match=r"have no keys and.*values of their own"):
        convert(model, [SEPARATE])


REFUSED = {
    "sliding_window 16": lambda: build(MistralConfig(**SIZES, sliding_window=16)),
    "layer_types": lambda: build(
        Qwen2Config(**SIZES, layer_types=["full_attention"] * 3 + ["sliding_attention"])
    ),
    "rope_type 'yarn'": lambda: build(
        LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        )
    ),
    "MixtralForCausalLM cannot be converted": lambda: build(MixtralConfig(**SIZES)),
    "LlamaForSequenceClassification cannot": lambda: LlamaForSequenceClassification(
        LlamaConfig(**SIZES)
    ),
    "a subclass": lambda: type("a subclass", (LlamaForCausalLM,), {})(LlamaConfig(**SIZES)),
    "PEFT.s adapters are added to a model that": lambda: with_attribute("peft_config", {}),
    "quantization_config": lambda: quantised(),
    "model.layers.1.mlp is a .*Adapter, not a module of llama": lambda: adapted(),
    "the forward of model.norm was replaced": lambda: patched(),
    "model.norm.weight is a QuantWeight": lambda: other_weight(),
    r"lm_head.weight \(70, 24\), expected \(61, 24\)": lambda: resized(),
}


def with_attribute(name, value):
    model = type("Wrapper", (torch.nn.Module,), {})()
    setattr(model, name, value)
    return model


def quantised():
    model = build(FAMILIES["llama"])
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def adapted():
    model = build(FAMILIES["llama"])
    model.model.layers[1].mlp = type("Adapter", (torch.nn.Module,), {})()
    return model


def patched():
    model = build(FAMILIES["llama"])
    model.model.norm.forward = lambda x: x
    return model


def other_weight():
    model = build(FAMILIES["llama"])
    kind = type("QuantWeight", (torch.nn.Parameter,), {})
    model.model.norm.weight = kind(model.model.norm.weight.data)
    return model


def resized():
    model = build(FAMILIES["llama"])
    model.lm_head = torch.nn.Linear(24, 70, bias=False)
    return model


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name_and_left_as_it_was(message):
    model = REFUSED[message]()
    kind, config = type(model), getattr(model, "config", None)
    with pytest.raises(ConfigError, match=message):
        convert(model, [LADDER])
    assert type(model) is kind
    assert getattr(model, "config", None) is config


def test_a_field_of_a_newer_transformers_is_refused():
    class NewerConfig(LlamaConfig):
        logit_softcap: float = 0.0

    model = build(FAMILIES["llama"])
    model.config = NewerConfig(**SIZES)
    convert(copy.deepcopy(model))
    model.config.logit_softcap = 30.0
    with pytest.raises(ConfigError, match=r"logit_softcap 30.0 of the llama model"):
        convert(model)
