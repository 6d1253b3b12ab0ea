"""The three models that ``compare.py`` trains, and one training run."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "ladder_residual"))


@dataclass(frozen=True)
class Arm:
    """An attention with one key-value head (MQA)."""

    head_dim: int
    """As in the paper, heads * head_dim is the hidden size: half the dimension, twice the heads."""
    cross_layer_attention: dict[str, Any] | None = None


ARMS = {
    "MQA": Arm(head_dim=32),
    "MQA, half heads": Arm(head_dim=16),
    "MQA + CLA2": Arm(32, {"sharing_factor": 2, "kv_norm": "separate"}),
}


@dataclass(frozen=True)
class Settings:
    """The paper's recipe, scaled down: AdamW, 5 % warm-up, cosine to a tenth, no dropout."""

    layers: int = 4
    hidden_size: int = 96
    ffn_size: int = 256
    init_std: float = 0.05
    vocab_size: int = 512
    sequence_length: int = 128
    batch_size: int = 8
    steps: int = 400
    validation_sequences: int = 256
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3, 12e-3)
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    """Of the runs that count. The grid has seed 0, so that its luck is not in the result."""
    documents: int | None = None


QUICK = Settings(
    layers=2,
    hidden_size=32,
    ffn_size=64,
    vocab_size=300,
    sequence_length=32,
    steps=4,
    validation_sequences=4,
    learning_rates=(1e-3, 4e-3),
    seeds=(1,),
    documents=20,
)


def prepare_tokens(settings: Settings, folder: Path) -> Path:
    """Token ids of the standard library's sources, by the ladder example's corpus and tokenizer.

    Returns:
        A file with the tensors ``train`` and ``valid``, whole documents held out.
    """
    import torch
    from prepare_data import END_OF_TEXT, read_documents, train_tokenizer
    from tokenizers import Tokenizer

    documents = read_documents(settings.documents)
    train_tokenizer(documents, settings.vocab_size, folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: dict[str, list[int]] = {"train": [], "valid": []}
    for document, encoding in zip(
        documents, tokenizer.encode_batch([d.text for d in documents]), strict=True
    ):
        ids["valid" if document.held_out else "train"] += [*encoding.ids, end]
    path = folder / "tokens.pt"
    torch.save({split: torch.tensor(tokens) for split, tokens in ids.items()}, path)
    return path


def build(settings: Settings, arm: Arm) -> Any:
    from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM

    config = PluginDecoderConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.ffn_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // arm.head_dim,
        num_key_value_heads=1,
        head_dim=arm.head_dim,
        max_position_embeddings=settings.sequence_length,
        initializer_range=settings.init_std,
        cross_layer_attention=arm.cross_layer_attention,
    )
    return PluginDecoderForCausalLM(config)


def schedule(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to a tenth."""
    warmup = max(1, settings.steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def train(settings: Settings, name: str, rate: float, seed: int, tokens: Path) -> dict[str, Any]:
    """One run on one thread; arms with the same seed see the same batches."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, data = build(settings, ARMS[name]), torch.load(tokens)
    fit(settings, model, rate, seed, data["train"])
    loss = validation_loss(settings, model, data["valid"])
    parameters = sum(p.numel() for p in model.parameters())
    return {"arm": name, "rate": rate, "seed": seed, "loss": loss, "parameters": parameters}


def fit(settings: Settings, model: Any, rate: float, seed: int, tokens: Any) -> None:
    """Train for ``settings.steps`` on random places of ``tokens``, the same for every model."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    span = torch.arange(settings.sequence_length)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = rate * schedule(step, settings)
        last = len(tokens) - settings.sequence_length
        starts = torch.randint(last, (settings.batch_size, 1), generator=generator)
        ids = tokens[starts + span]
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def validation_loss(settings: Settings, model: Any, tokens: Any) -> float:
    """Nats per token of sequences spread evenly over the held-out text."""
    import torch

    model.eval()
    last = len(tokens) - settings.sequence_length
    starts = torch.linspace(0, last, settings.validation_sequences).long().unsqueeze(1)
    sequences = tokens[starts + torch.arange(settings.sequence_length)]
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss for ids in sequences.split(settings.batch_size)]
    return float(sum(losses) / len(losses))
