"""The demo's model and training budget, and the Megatron flags they become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ARMS = {"standard": [], "ladder": ["--ladder-residual"]}
"""What each arm adds to the same command."""

TENSOR_PARALLEL = 2

# The backend sets the rest, such as --transformer-impl local and --distributed-backend gloo.
CPU_FLAGS = ["--cpu-backend", "--use-cpu-initialization", "--num-workers", "0"]
CPU_FLAGS += ["--no-create-attention-mask-in-dataloader"]


@dataclass(frozen=True)
class Settings:
    """A Llama-like GPT: RMSNorm, SwiGLU, RoPE, grouped queries, no biases."""

    layers: int = 4
    hidden_size: int = 256
    ffn_size: int = 704
    heads: int = 4
    query_groups: int = 2
    vocab_size: int = 4096
    sequence_length: int = 256
    batch_size: int = 8
    iterations: int = 200
    validation_batches: int = 10
    learning_rate: float = 1e-3
    warmup: int = 30
    seed: int = 1234
    log_interval: int = 5
    documents: int | None = None
    """Keep about so many documents of the corpus; None keeps all."""

    @property
    def tokens_per_iteration(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        return self.iterations * self.tokens_per_iteration

    @property
    def parameters(self) -> int:
        """Embedding and output, layers with two norms each, final norm."""
        hidden = self.hidden_size
        key_value = 2 * hidden * hidden * self.query_groups // self.heads
        layer = 2 * hidden * hidden + key_value + 3 * hidden * self.ffn_size + 2 * hidden
        return 2 * self.vocab_size * hidden + self.layers * layer + hidden

    def megatron_flags(self, data: Path, checkpoint: Path) -> list[str]:
        """Every flag of the run but the arm's own.

        Args:
            data: folder that ``prepare_data.py`` wrote.
            checkpoint: folder to save to.
        """
        model = f"""
            --num-layers {self.layers} --hidden-size {self.hidden_size}
            --ffn-hidden-size {self.ffn_size} --num-attention-heads {self.heads}
            --group-query-attention --num-query-groups {self.query_groups}
            --seq-length {self.sequence_length} --max-position-embeddings {self.sequence_length}
            --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
            --untie-embeddings-and-output-weights
            --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
        """
        training = f"""
            --tensor-model-parallel-size {TENSOR_PARALLEL}
            --micro-batch-size {self.batch_size} --global-batch-size {self.batch_size}
            --train-iters {self.iterations} --seed {self.seed}
            --lr {self.learning_rate} --min-lr {self.learning_rate / 10} --lr-decay-style cosine
            --lr-warmup-iters {self.warmup} --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
            --log-interval {self.log_interval} --save-interval {self.iterations}
            --eval-interval {self.iterations // 4 + 1} --eval-iters {self.validation_batches}
            --ckpt-format torch_dist --tokenizer-type HuggingFaceTokenizer
        """
        paths = {
            "--train-data-path": data / "train",
            "--valid-data-path": data / "valid",
            "--data-cache-path": data / "cache",
            "--tokenizer-model": data / "tokenizer",
            "--save": checkpoint,
        }
        flags = [*CPU_FLAGS, *model.split(), *training.split()]
        for flag, path in paths.items():
            flags += [flag, str(path)]
        return flags


FULL = Settings()
QUICK = Settings(
    layers=2,
    hidden_size=64,
    ffn_size=128,
    heads=4,
    query_groups=2,
    vocab_size=512,
    sequence_length=64,
    iterations=20,
    validation_batches=2,
    learning_rate=4e-3,
    warmup=4,
    log_interval=2,
    documents=40,
)
