"""The models that ``compare.py`` trains, as flags of Megatron's, and the text."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ARMS = ("dense", "dense, narrow", "stock MoE", "DS-MoE", "DS-MoE, no MI loss", "DS-MoE + heads")
"""The twin of all parameters; one of the active parameters; Megatron's own sparse mixture; ours,
with its loss, without it, and with attention experts too."""
WITH_EXPERTS, WEIGHTED = ARMS[3:], (ARMS[3], ARMS[5])
STOCK = ARMS[2]
PREPARE_DATA = Path(__file__).resolve().parents[1] / "ladder_residual" / "prepare_data.py"
Rule = tuple[str, float]
"""Of inference: ``("dense", 1)``, ``("top-k", K)`` or ``("threshold", eps)``."""


@dataclass(frozen=True)
class Settings:
    """A GPT so small that the width of its MLP matters: with a hidden size of 64, and within so few
    tokens, a dense model of the active width was as good as the wide one, and nothing was left to
    compare.

    RMSNorm, also of queries and keys, RoPE, grouped queries, GELU, no biases; AdamW, 5 % warm-up,
    cosine to a tenth.
    """

    layers: int = 3
    hidden_size: int = 32
    heads: int = 4
    key_value_heads: int = 2
    experts: int = 16
    expert_width: int = 8
    """So the wide MLP is four times the hidden size, as in the paper."""
    kept: int = 5
    """K of the sparse mixture, and the share at which arms are tuned: 31 percent."""
    router_width: int = 8
    """A quarter of the hidden size, as in the paper's 1B model."""
    attention_experts: int = 2
    init_std: float = 0.09
    vocab_size: int = 512
    sequence_length: int = 64
    batch_size: int = 16
    steps: int = 800
    validation_sequences: int = 256
    rates: tuple[float, ...] = (8e-3, 16e-3, 32e-3)
    weights: tuple[float, ...] = (1e-2, 3e-3, 3e-2, 1e-1)
    """Of the MI loss. The rate is tuned with the first, then the others are tried at that rate. The
    paper's 2e-4 to 6.3e-4 are for 24 to 36 layers and 30 to 100 billion tokens."""
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    """Of the runs that count. The grid has seed 0, so that its luck is not in the result."""
    documents: int | None = None

    @property
    def width(self) -> int:
        """Of the wide MLP."""
        return self.experts * self.expert_width

    @property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(n / 10 for n in range(1, 10))


QUICK = Settings(
    layers=2,
    hidden_size=32,
    heads=4,
    experts=4,
    expert_width=16,
    kept=2,
    router_width=4,
    attention_experts=2,
    vocab_size=300,
    sequence_length=32,
    batch_size=4,
    steps=4,
    validation_sequences=8,
    rates=(4e-3, 8e-3),
    weights=(1e-2, 1e-1),
    seeds=(1,),
    documents=20,
)


@dataclass(frozen=True)
class Run:
    """One training. ``weight``: of the MI loss; 0 for arms without it."""

    arm: str
    rate: float
    weight: float
    seed: int

    def __str__(self) -> str:
        weight = f" weight {self.weight:g}" if self.weight else ""
        return f"{self.arm}: lr {self.rate:g}{weight} seed {self.seed}"


def flags(settings: Settings, run: Run, save: Path | None = None) -> list[str]:
    """Megatron's command line; CPU, tokens and batches are not in it.

    Args:
        save: folder of the checkpoint, if it is wanted.
    """
    s = settings
    common = f"""
        --num-layers {s.layers} --hidden-size {s.hidden_size} --num-attention-heads {s.heads}
        --group-query-attention --num-query-groups {s.key_value_heads}
        --seq-length {s.sequence_length} --max-position-embeddings {s.sequence_length}
        --position-embedding-type rope --normalization RMSNorm --disable-bias-linear
        --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --init-method-std {s.init_std} --qk-layernorm --micro-batch-size {s.batch_size}
        --global-batch-size {s.batch_size}
        --train-iters {s.steps} --seed {run.seed + 1} --lr {run.rate} --min-lr {run.rate / 10}
        --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta2 0.95
        --clip-grad 1.0 --tokenizer-type NullTokenizer --vocab-size {s.vocab_size - 1}
        --use-cpu-initialization --ckpt-format torch_dist --no-bias-gelu-fusion
    """
    words = shlex.split(common) + shlex.split(_mlp(s, run))
    return words if save is None else [*words, "--save", str(save), "--save-interval", str(s.steps)]


def _mlp(s: Settings, run: Run) -> str:
    """The flags in which arms differ."""
    if run.arm == "dense":
        return f"--ffn-hidden-size {s.width}"
    if run.arm == "dense, narrow":
        return f"--ffn-hidden-size {s.kept * s.expert_width}"
    if run.arm == STOCK:
        return f"""
            --num-experts {s.experts} --moe-ffn-hidden-size {s.expert_width}
            --moe-router-topk {s.kept} --moe-router-pre-softmax
            --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
            --moe-token-dispatcher-type allgather
        """
    ours = f"""
        --dsmoe-num-experts {s.experts} --dsmoe-ffn-hidden-size {s.expert_width}
        --dsmoe-router-hidden-size {s.router_width} --dsmoe-mi-weight-mlp {run.weight}
        --dsmoe-mi-weight-attention {run.weight}
    """
    if run.arm == "DS-MoE + heads":
        ours += f" --dsmoe-attention-experts {s.attention_experts}"
    return ours


def prepare_data(settings: Settings, folder: Path) -> None:
    """Write the ladder example's corpus, Python's standard library, unless it is there already.

    Raises:
        RuntimeError: it failed; the message is its last words.
    """
    command = [sys.executable, str(PREPARE_DATA), "--output", str(folder)]
    command += ["--vocab-size", str(settings.vocab_size)]
    if settings.documents:
        command += ["--documents", str(settings.documents)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError("\n".join(result.stderr.splitlines()[-12:]))
