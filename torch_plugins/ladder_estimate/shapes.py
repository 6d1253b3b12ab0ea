"""Sizes of Llama-like decoders: named ones, or those of a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..feature import ConfigError


@dataclass(frozen=True)
class Shape:
    """A decoder of RMSNorm, grouped-query attention and a gated MLP, without biases."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """The head's matrix is the embedding's."""

    @property
    def attention_parameters(self) -> int:
        """Of one layer's query, key, value and output matrices."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer's gate, up and down matrices."""
        return 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Of the whole model, norms and embedding included."""
        layer = self.attention_parameters + self.mlp_parameters + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    def per_rank(self, tp: int) -> tuple[int, int, int]:
        """``(heads, kv_heads, intermediate)`` of one rank; with fewer KV heads than ranks, each
        rank has a copy of one.

        Raises:
            ConfigError: ``tp`` does not divide the model.
        """
        for name, size in (("attention heads", self.heads), ("MLP columns", self.intermediate)):
            if size % tp:
                raise ConfigError(f"--tp {tp}: does not divide the model's {size} {name}")
        if self.kv_heads % tp and tp % self.kv_heads:
            raise ConfigError(
                f"--tp {tp}: neither divides the model's {self.kv_heads} KV heads nor is a "
                "multiple of them"
            )
        return self.heads // tp, max(1, self.kv_heads // tp), self.intermediate // tp


MODELS = {
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, tied=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "llama-3.1-405b": Shape(126, 16384, 53248, 128, 8, 128, 128256),
}
"""Meta's releases, from their ``config.json``."""

_DENSE = ("llama", "mistral", "granite", "qwen2", "qwen3", "plugin_decoder")

_UNLIKE = ("num_local_experts", "dense_moe", "cross_layer_attention", "desync_residual")


def from_config(path: Path) -> Shape:
    """Read ``config.json``, or that of a model folder.

    Raises:
        ConfigError: there is none, it is no dense decoder of this kind, or a size is missing.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--config {path}: is no JSON object; give a model's config.json")
    kind = config.get("model_type")
    unlike = [key for key in _UNLIKE if config.get(key)]
    unlike += ["mlp_gated"] if config.get("mlp_gated") is False else []
    if kind not in _DENSE or unlike:
        raise ConfigError(
            f"--config {path}: model_type {kind!r}{' with ' * bool(unlike)}{', '.join(unlike)} "
            f"is not estimated; dense decoders are: {', '.join(_DENSE)}"
        )
    heads = _size(config, "num_attention_heads", path)
    hidden = _size(config, "hidden_size", path)
    return Shape(
        _size(config, "num_hidden_layers", path),
        hidden,
        _size(config, "intermediate_size", path),
        heads,
        _size(config, "num_key_value_heads", path, heads),
        _size(config, "head_dim", path, hidden // heads),
        _size(config, "vocab_size", path),
        bool(config.get("tie_word_embeddings", False)),
    )


def _size(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"--config {path}: {key} is {value!r}; must be an integer of at least 1")
    return value
