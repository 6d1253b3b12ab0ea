"""One training of the comparison: the data, a small Qwen3, and a loop with ``PowerLR``."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compare_settings import Run, Settings
from torch import Tensor

from torch_plugins.power_lr import PowerLR

PREPARE_DATA = Path(__file__).resolve().parents[1] / "ladder_residual" / "prepare_data.py"


@dataclass(frozen=True)
class Outcome:
    loss: float
    """Of held-out text after training, in nats per token."""
    seconds: float
    """CPU time."""


def prepare_data(settings: Settings, folder: Path) -> dict[str, Any]:
    """Write the ladder example's corpus, Python's standard library, unless it is there already.

    Returns:
        its ``data.json``.

    Raises:
        RuntimeError: the preparation failed; the message is its last words.
    """
    command = [sys.executable, str(PREPARE_DATA), "--output", str(folder)]
    command += ["--vocab-size", str(settings.vocab_size)]
    if settings.documents:
        command += ["--documents", str(settings.documents)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError("\n".join(result.stderr.splitlines()[-12:]))
    return json.loads((folder / "data.json").read_text())


def sequences(path: Path, length: int) -> Tensor:
    """The tokens of a ``.bin`` of Megatron's indexed format, cut into rows of ``length``.

    It holds the bare token ids, of 16 bits for a vocabulary as small as these.
    """
    size = path.stat().st_size // 2
    tokens = torch.from_file(str(path), size=size, dtype=torch.uint16)
    return tokens[: size // length * length].to(torch.int64).view(-1, length)


def build_model(settings: Settings) -> Any:
    """A Qwen3: its norms of queries and keys keep small models stable at high rates."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.hidden_size * 5 // 2,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            head_dim=settings.hidden_size // settings.heads,
            max_position_embeddings=settings.sequence_length,
            initializer_range=0.5 * settings.hidden_size**-0.5,
        )
    )


def batches(data: Tensor, run: Run) -> Iterator[Tensor]:
    """The run's batches. A seed's order is one for all horizons and batch sizes."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed))
    for step in range(run.tokens // (run.batch_size * data.shape[1])):
        yield data[order[step * run.batch_size : (step + 1) * run.batch_size]]


def build_scheduler(optimizer: torch.optim.Optimizer, run: Run, settings: Settings) -> PowerLR:
    """``PowerLR`` plays every arm: cosine and WSD are cases of the schedule with b = 0."""
    schedule = asdict(run.schedule(settings))
    return PowerLR(
        optimizer,
        batch_size=run.batch_size,
        sequence_length=settings.sequence_length,
        **schedule.pop("power"),
        **schedule,
    )


def start_worker() -> None:
    """In each process that trains: one core, and no life without the process that started it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def train(run: Run, settings: Settings, folder: Path) -> Outcome:
    """Train on the corpus in ``folder`` and measure the loss on its held-out part."""
    started = time.process_time()
    data = sequences(folder / "train.bin", settings.sequence_length)
    held_out = sequences(folder / "valid.bin", settings.sequence_length)
    torch.manual_seed(run.seed)
    model = build_model(settings)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=run.schedule(settings).max_lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    scheduler = build_scheduler(optimizer, run, settings)
    for batch in batches(data, run):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    loss = evaluate(model, held_out[: settings.validation_sequences])
    return Outcome(loss if math.isfinite(loss) else math.inf, time.process_time() - started)


@torch.no_grad()
def evaluate(model: Any, data: Tensor) -> float:
    """Mean loss of the sequences, all of one length."""
    losses = [model(input_ids=x, labels=x, use_cache=False).loss * len(x) for x in data.split(32)]
    return float(sum(losses)) / len(data)
