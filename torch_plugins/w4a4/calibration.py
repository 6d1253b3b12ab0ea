"""Calibration tokens from a file: text, JSON lines, or token ids as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..feature import ConfigError

KEY = "input_ids"


def read_tokens(
    path: Path, model: Path, config: Any, tokens: int, length: int, remote_code: bool = False
) -> Tensor:
    """Token ids ``[sequences, length]``, the first of a file.

    Args:
        path: ``.safetensors`` with ``input_ids``, one or two dimensions; ``.jsonl`` with a "text"
            in each line; anything else is UTF-8 text. Text needs the tokenizer in ``model``, and a
            document ends with its end-of-sequence token, where it has one.
        tokens: at most; whole sequences.
        length: of a sequence.

    Raises:
        ConfigError: nothing there, too few tokens for one sequence, or ids beyond the vocabulary.
    """
    if not path.is_file():
        raise ConfigError(f"--calibration {path}: no such file")
    if tokens < length:
        raise ConfigError(f"--tokens {tokens}: fewer than one sequence, --seq-length {length}")
    flat = (
        _stored(path) if path.suffix == ".safetensors" else _text(path, model, tokens, remote_code)
    )
    count = min(tokens, flat.numel()) // length
    if not count:
        raise ConfigError(
            f"--calibration {path}: {flat.numel()} tokens, fewer than one sequence; give more, or "
            f"a smaller --seq-length than {length}"
        )
    ids = flat[: count * length].reshape(count, length)
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ConfigError(
            f"--calibration {path}: token {wrong} is not in the model's vocabulary of "
            f"{config.vocab_size}; tokenize with the model's own tokenizer"
        )
    return ids


def _stored(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"--calibration {path}: {error}") from error
    ids = tensors.get(KEY)
    if ids is None or ids.is_floating_point():
        raise ConfigError(
            f"--calibration {path}: no integers {KEY!r}, but {', '.join(sorted(tensors))}"
        )
    return ids.flatten().long()


def _text(path: Path, model: Path, tokens: int, remote_code: bool) -> Tensor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--calibration {path}: text, and {model} has no tokenizer; give a .safetensors file "
            f"with {KEY!r}"
        ) from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in _documents(path):
        ids += tokenizer(document)["input_ids"] + end
        if len(ids) >= tokens:
            break
    return torch.tensor(ids, dtype=torch.long)


def _documents(path: Path) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text("utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(path, number, line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration {path}: no UTF-8 text; {error}") from error


def _field(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(f'--calibration {path}: line {number} is no object with a "text"')
    return text
