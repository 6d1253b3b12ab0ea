"""Small decoders of every shape."""

import pytest
import torch

from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def make_config():
    def make(**fields):
        return PluginDecoderConfig(**{**TINY, **fields})

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Model in eval mode, with large random weights (biases and norms too), so that errors show."""

    def make(dtype=torch.float32, seed=0, **fields):
        torch.manual_seed(seed)
        model = PluginDecoderForCausalLM(make_config(**fields)).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
        return model

    return make


@pytest.fixture(scope="session")
def tokens():
    def draw(batch=2, length=7, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, TINY["vocab_size"], (batch, length), generator=generator)

    return draw
