"""Without plugin features the decoder is a stock model, tensor for tensor and logit for logit."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from torch_plugins import reference
from torch_plugins.hf import stock_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


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
    ],
)
def test_what_no_stock_model_expresses(make_config, fields):
    assert stock_config(make_config(**fields)) is None
