"""Without plugin features the decoder is a stock model, tensor for tensor and logit for logit; with
DS-MoE it may be a stock mixture of experts under other names."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from torch_plugins import reference
from torch_plugins.export.proof import folder_logits, tolerance, with_all_experts
from torch_plugins.export.tokenizer import Tokenizer
from torch_plugins.export.writer import write_model
from torch_plugins.hf import stock_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

MOE = {"num_experts": 5, "gated": True, "router": "linear"}
"""8 wide each."""
TOP_K = {"inference": "top-k", "top_k": 2}
INEXPRESSIBLE_EXPERTS = [
    {"router": "mlp"},
    {"attention_experts": 2},
    {"inference": "threshold"},
    {"inference": "threshold-top-k"},
    {"inference": "threshold-top-k", "top_k": 2},
]


class Memory(dict):
    """Tensors that a writer reads."""

    def meta(self, name):
        return self[name].to("meta")


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "norm_eps": 1e-3}),
        ("llama", {"ladder_residual": {"layers": "none"}, "hidden_act": "gelu"}),
        ("granite", {"residual_multiplier": 0.3}),
        ("granite", {"attention_multiplier": 0.1, "head_dim": 10}),
        ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_bias": True}),
    ],
)
def test_stock_model_gives_the_same_logits(make_model, tokens, tmp_path, model_type, fields):
    model = make_model(**fields, eos_token_id=5)
    config = stock_config(model.config)
    assert config.model_type == model_type
    assert config.eos_token_id == 5
    stock = AutoModelForCausalLM.from_config(config).eval()
    assert stock.state_dict().keys() == model.state_dict().keys()
    stock.load_state_dict(model.state_dict())
    expected = model(tokens()).logits
    torch.testing.assert_close(stock(tokens()).logits, expected, rtol=1e-6, atol=1e-6)

    stock.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(stock)
    torch.testing.assert_close(again(tokens()).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"residual_multiplier": 0.3, "attention_multiplier": 0.1}])
def test_the_reference_reads_stock_configurations(make_model, tokens, fields):
    model = make_model(torch.float64, **fields)
    stock = stock_config(model.config)
    got = reference.logits(model.state_dict(), stock.to_diff_dict(), tokens())
    torch.testing.assert_close(got, model(tokens()).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "fields",
    [
        {"ladder_residual": {"layers": "all"}},
        {"ladder_residual": {"layers": "0"}},
        {"normalization": "layernorm"},
        {"mlp_gated": False},
        {"position_embedding_type": "learned_absolute"},
        {"position_embedding_type": "none"},
        {"head_dim": 12, "rope_parameters": {"partial_rotary_factor": 0.5}},
        {"attention_bias": True, "attention_output_bias": False},
        {"hidden_size": 26, "head_dim": 6},
        {"qk_norm": True},
        *[{"dense_moe": MOE | section} for section in INEXPRESSIBLE_EXPERTS],
        {"dense_moe": {"attention_experts": 2}},
        {"dense_moe": MOE | {"gated": False}, "mlp_gated": False, "hidden_act": "gelu"},
        {"dense_moe": MOE, "hidden_act": "gelu"},
        {"dense_moe": MOE, "residual_multiplier": 0.3},
        {"dense_moe": MOE, "attention_multiplier": 0.1},
        {"dense_moe": MOE, "attention_bias": True},
        {"dense_moe": MOE, "head_dim": 10},
        {"dense_moe": MOE, "qk_norm": True, "attention_bias": True, "attention_output_bias": False},
        {"dense_moe": MOE, "ladder_residual": {"layers": "0"}},
        {"dense_moe": MOE, "cross_layer_attention": {"sharing_factor": 2}},
    ],
)
def test_what_no_stock_model_expresses(make_config, fields):
    assert stock_config(make_config(**fields)) is None


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen2_moe", {"dense_moe": MOE}),
        (
            "qwen2_moe",
            {"dense_moe": MOE | TOP_K, "attention_bias": True, "attention_output_bias": False},
        ),
        ("qwen3_moe", {"dense_moe": MOE | TOP_K, "qk_norm": True, "head_dim": 10}),
        (
            "qwen3_moe",
            {
                "dense_moe": MOE,
                "qk_norm": True,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        ),
    ],
)
def test_experts_become_a_stock_mixture(make_model, tokens, tmp_path, model_type, fields):
    model = make_model(**fields, eos_token_id=5, rope_parameters=LLAMA3)
    tensors = Memory(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    written = write_model(tmp_path, model.config, tensors, Tokenizer(), "5GB", lambda line: None)
    assert written == model_type
    names = load_file(tmp_path / "model.safetensors")
    assert names["model.layers.3.mlp.experts.4.down_proj.weight"].shape == (24, 8)
    assert not any("router" in name or ".mlp.up_proj" in name for name in names)

    with torch.no_grad():
        expected = model(tokens()).logits
        bound = tolerance(model.config, expected)
        assert (folder_logits(tmp_path, tokens()) - expected).abs().max() < bound
        everything = folder_logits(tmp_path, tokens(), all_experts=True)
        wide = with_all_experts(model.config)
        naive = reference.logits(model.state_dict(), wide, tokens())
    assert (everything - naive).abs().max() < bound
    sparse = "top_k" in fields["dense_moe"]
    assert torch.equal(everything, folder_logits(tmp_path, tokens())) == (not sparse)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_experts_per_tok"] == (2 if sparse else 5)
    assert config["eos_token_id"] == 5
    assert "dense_moe" not in config
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__module__.startswith(
        "transformers"
    )


def test_other_experts_keep_the_decoder_and_its_tensors(make_model, tokens, tmp_path):
    moe = {"num_experts": 5, "gated": True, "attention_experts": 2, "inference": "threshold"}
    model = make_model(dense_moe=moe)
    tensors = Memory(model.state_dict())
    written = write_model(tmp_path, model.config, tensors, Tokenizer(), "5GB", lambda line: None)
    assert written == "plugin_decoder"
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()
    found = folder_logits(tmp_path, tokens(), all_experts=True)
    sparse = model(tokens()).logits
    model.set_experts(inference="dense")
    dense = model(tokens()).logits
    torch.testing.assert_close(found, dense.detach(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(sparse, dense, rtol=1e-3)
