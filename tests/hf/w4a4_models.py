"""Models that are quantized, with and without W4A4's clips."""

from __future__ import annotations

import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

import torch_plugins.hf
from torch_plugins.config import W4A4
from torch_plugins.w4a4.linear import swap
from torch_plugins.w4a4.quantizer import quantizers_of

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


def save(build, feature, path):
    """A model with weights so large, biases and norms too, that an error shows in the logits."""
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
    model.save_pretrained(path)
    return path
