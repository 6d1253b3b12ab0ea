"""What a run measures: shapes, tokens, threads, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OPERATORS = ("linear", "moe", "fake-quant", "norm")
OUTPUT = Path(__file__).resolve().parents[2] / "out" / "bench_csrc"


@dataclass(frozen=True)
class Settings:
    """Each field is an argument of ``bench.py``."""

    operators: tuple[str, ...] = OPERATORS
    threads: tuple[int, ...] = (1, 2)
    shapes: tuple[str, ...] = ("2048x2048", "4096x4096", "4096x11008")
    """K x N: input and output features of the linear layer."""
    tokens: tuple[int, ...] = (1, 8, 32, 128, 512)
    """M, with weights in the cache where they fit."""
    cold: tuple[int, ...] = (1, 8, 32)
    """M, with weights in memory; with more tokens they no longer matter."""
    moe_shapes: tuple[str, ...] = ("1024x512x32x8", "2048x1024x8x2")
    """Hidden size x width of an expert x experts x experts kept."""
    moe_tokens: tuple[int, ...] = (1, 8, 32, 512)
    elements: tuple[int, ...] = (2**20, 2**24)
    """Of fake quantization, in fp32: 4 MB and 64 MB."""
    rows: tuple[int, ...] = (1, 32, 512)
    """Of add + RMSNorm, 4096 bf16 features each."""
    seconds: float = 4.0
    """For one row of a table, and as many rounds as fit."""
    rounds: int = 7
    """At least."""


QUICK = Settings(
    threads=(1,),
    shapes=("2048x2048",),
    tokens=(1, 32),
    cold=(1,),
    moe_shapes=("1024x512x32x8",),
    moe_tokens=(1, 32),
    elements=(2**20,),
    rows=(1, 32),
    seconds=0.5,
    rounds=3,
)


def numbers(shape: str, count: int) -> tuple[int, ...]:
    """``2048x2048`` as its numbers."""
    found = tuple(int(number) for number in shape.split("x") if number.isdecimal())
    if len(found) != count or not all(found):
        raise SystemExit(
            f"{shape}: must be {count} numbers above 0, as in {'x'.join(['64'] * count)}"
        )
    return found
