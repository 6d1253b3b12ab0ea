"""What ``experiment.py`` trains: arms, variants of the model, sizes, and the text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_plugins.config import W4A4

sys.path.append(str(Path(__file__).resolve().parents[1] / "ladder_residual"))

ARMS = ("baseline", "inputs", "outputs", "both")
"""Nothing; learned clips of the inputs; kurtosis of the outputs; the method, which has both."""
PLANTED = "planted"
"""The variant whose residual stream has channels that start much larger than the others."""
RESIDUAL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Kinds of linear layers that read the residual stream, through a norm."""
INNER = ("o_proj", "down_proj")
"""Those that read what attention or the MLP computed inside."""


@dataclass(frozen=True)
class Settings:
    """A Llama of transformers': AdamW, 5 % warm-up, cosine to a tenth, no dropout."""

    layers: int = 4
    hidden_size: int = 96
    ffn_size: int = 256
    heads: int = 4
    init_std: float = 0.05
    planted_channels: int = 3
    planted_factor: float = 20.0
    """What the planted variant's channels are multiplied by where layers write the residual stream:
    rows of o_proj and down_proj."""
    vocab_size: int = 512
    sequence_length: int = 128
    batch_size: int = 4
    steps: int = 600
    rate: float = 3e-3
    weights: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    """Of the kurtosis. Tried in the arm with both, planted, with seed 0."""
    tolerance: float = 0.01
    """The largest weight is chosen whose perplexity is at most this share above the best."""
    seeds: tuple[tuple[str, tuple[int, ...]], ...] = ((PLANTED, (1, 2)), ("natural", (1, 2)))
    """Variants, and the seeds of their runs that count: the luck of seed 0 is not in the result."""
    probes: tuple[float, ...] = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1)
    """When outliers are measured, as shares of the steps."""
    probe_sequences: int = 8
    calibration_sequences: int = 32
    validation_sequences: int = 64
    percentiles: tuple[float, ...] = (99.0, 99.9, 100.0)
    """For static clips of arms without learned ones; the best by the loss on calibration text."""
    documents: int | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(variant for variant, _ in self.seeds)

    @property
    def start(self) -> int:
        """First step that quantizes: after two warm-ups."""
        return self.steps // 10

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length


QUICK = Settings(
    layers=2,
    hidden_size=32,
    ffn_size=64,
    heads=2,
    vocab_size=300,
    sequence_length=32,
    batch_size=8,
    steps=60,
    rate=1e-2,
    weights=(1e-2,),
    seeds=((PLANTED, (1,)),),
    probes=(0, 0.5, 1),
    calibration_sequences=16,
    validation_sequences=32,
    documents=20,
)


@dataclass(frozen=True)
class Run:
    """One training. ``weight``: of the kurtosis; 0 for arms without it."""

    variant: str
    arm: str
    weight: float
    seed: int

    def __str__(self) -> str:
        weight = f", kurtosis {self.weight:g}" if self.weight else ""
        return f"{self.variant}, {self.arm}{weight}, seed {self.seed}"


def feature_of(settings: Settings, run: Run) -> W4A4 | None:
    """What the plugin is asked for; None for the baseline."""
    if run.arm == "baseline":
        return None
    bits = 0 if run.arm == "outputs" else 4
    return W4A4(activation_bits=bits, kurtosis_weight=run.weight, start_iteration=settings.start)


def weighted(arm: str) -> bool:
    """Whether the arm has the kurtosis."""
    return arm in ("outputs", "both")


def prepare_tokens(settings: Settings, folder: Path) -> dict[str, Tensor]:
    """Token ids of the sources of Python's standard library, by the ladder example's corpus and
    tokenizer.

    Returns:
        ``train`` and ``valid``, whole documents held out; also in ``tokens.pt``.
    """
    from prepare_data import END_OF_TEXT, fingerprint, read_documents, train_tokenizer
    from tokenizers import Tokenizer

    documents = read_documents(settings.documents)
    path = folder / f"tokens_{fingerprint(documents, settings.vocab_size)}.pt"
    if path.exists():
        return torch.load(path)
    train_tokenizer(documents, settings.vocab_size, folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: dict[str, list[int]] = {"train": [], "valid": []}
    for document, encoding in zip(
        documents, tokenizer.encode_batch([d.text for d in documents]), strict=True
    ):
        ids["valid" if document.held_out else "train"] += [*encoding.ids, end]
    data = {split: torch.tensor(tokens) for split, tokens in ids.items()}
    torch.save(data, path)
    return data


def sequences(settings: Settings, tokens: Tensor, count: int) -> Tensor:
    """``[count, s]``, spread evenly over ``tokens``."""
    last = len(tokens) - settings.sequence_length
    starts = torch.linspace(0, last, count).long().unsqueeze(1)
    return tokens[starts + torch.arange(settings.sequence_length)]
