"""Throughput of one layer's experts: all, those kept, and transformers' sparse experts.

    python examples/dense_moe/bench_sparse.py            # about two minutes
    python examples/dense_moe/bench_sparse.py --quick    # a toy, to see it work

Gated experts (SwiGLU) with random weights on the CPU, one thread, in fp32 and bf16. Every arm has
the same weights, tokens and kept experts, each token K of N at random; what it computes is checked
against the dense layer before it is timed:

    dense          torch_plugins.dense_moe.dense_mlp, all experts on all tokens
    sparse         torch_plugins.dense_moe.sparse_mlp, the K kept
    eager          transformers' experts (Qwen3MoeExperts), the loop over experts
    grouped_mm     the same with experts_implementation grouped_mm

Arms take turns, each turn beginning with another, and a ratio is the median of quotients within a
turn. "touched" is the share of experts that some token keeps: where time is spent on reading
weights, as in decoding, a sparse layer cannot beat the dense one by more than that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_plugins.dense_moe import dense_mlp, keep, sparse_mlp

ARMS = ("dense", "sparse", "eager", "grouped_mm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Arm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """The layer, the token counts, and how long to measure."""

    hidden_size: int = 1024
    num_experts: int = 32
    ffn_hidden_size: int = 128
    kept: tuple[int, ...] = (10, 4)
    """K: 31 percent of 32 experts, and one in eight."""
    decode: tuple[int, ...] = (1, 8, 32)
    prefill: tuple[int, ...] = (512, 2048)
    seconds: float = 4.0
    """For one row, of three turns or more."""
    most_turns: int = 60


QUICK = Settings(16, 8, 8, kept=(2,), decode=(1, 3), prefill=(40,), seconds=0.01, most_turns=4)


@dataclass(frozen=True)
class Layer:
    """The same weights as two wide matrices of ours and one, and as transformers keeps them."""

    gate: Tensor
    up: Tensor
    down: Tensor
    theirs: Any

    @classmethod
    def draw(cls, settings: Settings, dtype: torch.dtype) -> Layer:
        """Random weights of such size that outputs are near 1."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        hidden, experts, width = (
            settings.hidden_size,
            settings.num_experts,
            settings.ffn_hidden_size,
        )
        torch.manual_seed(0)
        shape = (experts * width, hidden)
        gate, up = (torch.randn(shape).mul(hidden**-0.5).to(dtype) for _ in range(2))
        down = torch.randn(hidden, experts * width).mul(width**-0.5).to(dtype)
        config = Qwen3MoeConfig(
            hidden_size=hidden, num_experts=experts, moe_intermediate_size=width
        )
        theirs = Qwen3MoeExperts(config).to(dtype)
        with torch.no_grad():
            pair = [matrix.unflatten(0, (experts, width)) for matrix in (gate, up)]
            theirs.gate_up_proj.copy_(torch.cat(pair, 1))
            theirs.down_proj.copy_(down.unflatten(1, (experts, width)).transpose(0, 1))
        return cls(gate, up, down, theirs)


def arms(layer: Layer, scores: Tensor, k: int) -> dict[str, Arm]:
    """Every implementation as a function of the tokens, from their scores on."""

    def theirs(implementation: str) -> Arm:
        def forward(x: Tensor) -> Tensor:
            layer.theirs.config._experts_implementation = implementation
            weights, chosen = scores.topk(k, -1)
            output: Tensor = layer.theirs(x, chosen, weights)
            return output

        return forward

    weights = (layer.gate, layer.up), layer.down, F.silu
    return {
        "dense": lambda x: dense_mlp(x, scores, *weights),
        "sparse": lambda x: sparse_mlp(x, scores, keep(scores, top_k=k), *weights),
        "eager": theirs("eager"),
        "grouped_mm": theirs("grouped_mm"),
    }


def measure(settings: Settings, layer: Layer, tokens: int, k: int) -> dict[str, Any]:
    """One row: seconds of every arm, and its speed over dense."""
    dtype = layer.gate.dtype
    x = torch.randn(tokens, settings.hidden_size).to(dtype)
    # Scores far apart, so that all arms choose alike in bf16 too.
    order = torch.rand(tokens, settings.num_experts).argsort(-1)
    scores = (0.1 * order).softmax(-1).to(dtype)
    kept = keep(scores, top_k=k)
    ready = arms(layer, scores, k)
    expected = dense_mlp(x, scores * kept, (layer.gate, layer.up), layer.down, F.silu)
    for name in ARMS[1:]:
        close = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(ready[name](x), expected, **close)
    times = take_turns(settings, ready, x)
    return {
        "tokens": tokens,
        "kept": k,
        "touched": kept.any(0).float().mean().item(),
        "tokens_per_second": {arm: tokens / median(times[arm]) for arm in ARMS},
        "speedup": {
            arm: median(base / own for base, own in zip(times["dense"], times[arm], strict=True))
            for arm in ARMS
        },
        "seconds": times,
    }


def take_turns(settings: Settings, ready: dict[str, Arm], x: Tensor) -> dict[str, list[float]]:
    """Seconds of this thread for one forward pass of every arm, one for each turn."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    begun = time.thread_time()
    for turn in range(settings.most_turns):
        first = turn % len(ARMS)
        for arm in ARMS[first:] + ARMS[:first]:
            start = time.thread_time()
            ready[arm](x)
            times[arm].append(time.thread_time() - start)
        if turn >= 3 and time.thread_time() - begun > settings.seconds:
            break
    return {arm: each[1:] for arm, each in times.items()}  # the first one warms up


def run(settings: Settings) -> list[dict[str, Any]]:
    """Every row of the table."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # experts outside a model choose no implementation
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            layer = Layer.draw(settings, dtype)
            for k in settings.kept:
                for phase in ("decode", "prefill"):
                    for tokens in getattr(settings, phase):
                        row = measure(settings, layer, tokens, k)
                        rows.append({"dtype": name, "phase": phase, **row})
    return rows


def print_table(rows: list[dict[str, Any]], settings: Settings) -> None:
    """Thousands of tokens a second, and the speed of every arm over dense."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{settings.num_experts} SwiGLU experts of width {settings.ffn_hidden_size}, hidden "
        f"size {settings.hidden_size}: tokens/s, and over dense"
    )
    for name in ("dtype", "phase", "tokens", "K", "touched", "dense\ntok/s"):
        table.add_column(name, justify="right")
    for arm in ARMS[1:]:
        table.add_column(f"{arm}\n/ dense", justify="right")
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if any(before[name] != row[name] for name in ("dtype", "kept")):
            table.add_section()
        table.add_row(
            *(str(row[name]) for name in ("dtype", "phase", "tokens", "kept")),
            f"{row['touched']:.0%}",
            f"{row['tokens_per_second']['dense']:,.0f}",
            *(f"{row['speedup'][arm]:.2f}" for arm in ARMS[1:]),
        )
    Console(soft_wrap=True, width=max(100, Console().width)).print(table)  # also into a file


def main() -> None:
    """Measure, print, and write the numbers where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy layer and few tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time measured")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    rows = run(settings)
    print_table(rows, settings)
    if arguments.json is not None:
        told = {"settings": asdict(settings), "torch": torch.__version__, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")
        print(f"written: {arguments.json}")


if __name__ == "__main__":
    main()
