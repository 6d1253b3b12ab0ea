"""Small Llama and Granite folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 301,  # no multiple of anything
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 9000,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.05,  # neither 1 / d nor 1 / sqrt(d)
    "logits_scaling": 4.0,
}
KINDS = ("llama", "granite")


def save(config: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    """A model with weights large enough for every part to matter."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        value = torch.randn(weight.shape, generator=generator)
        one = name.endswith("norm.weight")
        weight.data = one + 0.3 * value if weight.dim() == 1 else 0.15 * value
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def make(place: Path) -> None:
    """``llama``: bf16, several files, wide heads; ``granite``: fp32, tied embeddings."""
    llama = LlamaConfig(**SIZES, head_dim=24, rope_parameters=LLAMA3, rms_norm_eps=1e-6)
    save(llama, place / "llama", torch.bfloat16, "100KB")
    save(GraniteConfig(**SIZES, **MULTIPLIERS, tie_word_embeddings=True), place / "granite")
