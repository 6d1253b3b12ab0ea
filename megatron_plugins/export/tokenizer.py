"""Tokenizer files of the export, and the vocabulary without Megatron's padding."""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_plugins.config import ConfigError

PATTERNS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""What a tokenizer folder may hold; weights and code stay behind."""

SPECIAL = {
    "eos_token": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
}
"""A bare ``tokenizer.json`` does not tell the roles of its tokens: the first of these it has."""


@dataclass
class Tokenizer:
    """What an export needs of a tokenizer; without one, no files and no special tokens."""

    path: Path | None = None
    size: int | None = None
    special_ids: dict[str, int] = field(default_factory=dict)
    """``bos_token_id`` and the like -> id."""
    _loaded: Any = None

    @classmethod
    def load(cls, path: Path | None) -> Tokenizer:
        """From a folder or a ``tokenizer.json``.

        Raises:
            ConfigError: there is nothing that transformers can load.
        """
        if path is None:
            return cls()
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if not path.exists():
            raise ConfigError(f"--tokenizer {path}: no such file or folder")
        try:
            if path.is_dir():
                loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
            else:
                loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # transformers raises whatever the file provokes
            raise ConfigError(
                f"--tokenizer {path}: not a tokenizer that transformers can load ({error}); give a "
                "folder with its files, or a tokenizer.json"
            ) from error
        vocabulary = loaded.get_vocab()
        if path.is_file():
            for role, names in SPECIAL.items():
                found = [name for name in names if name in vocabulary]
                if found:
                    setattr(loaded, role, found[0])
        special = {
            f"{role}_id": vocabulary[token]
            for role in SPECIAL
            if (token := getattr(loaded, role)) is not None and token in vocabulary
        }
        return cls(path, max(vocabulary.values()) + 1, special, loaded)

    def write(self, folder: Path) -> None:
        """Copy its files; from a bare ``tokenizer.json`` also write the rest."""
        if self.path is None:
            return
        if self.path.is_file():
            self._loaded.save_pretrained(folder)
            return
        for pattern in PATTERNS:
            for file in self.path.glob(pattern):
                shutil.copyfile(file, folder / file.name)


def vocabulary(args: Namespace, padded: int, tokenizer: Tokenizer) -> tuple[int, str]:
    """Rows of the embedding that stand for tokens, and how that is known.

    Megatron pads the vocabulary to a multiple of ``--make-vocab-size-divisible-by`` times the
    tensor parallel size. The true size is the tokenizer's; without one, that of ``--vocab-size``
    where it leads to this padding; else every row is kept.

    Raises:
        ConfigError: the tokenizer has more tokens than the embedding has rows.
    """
    if tokenizer.size is not None:
        if tokenizer.size > padded:
            raise ConfigError(
                f"--tokenizer {tokenizer.path}: {tokenizer.size} tokens, but the checkpoint's "
                f"embedding has {padded} rows; give the tokenizer it was trained with"
            )
        return tokenizer.size, "tokens of the tokenizer"
    size = getattr(args, "vocab_size", None)
    if size is not None and args.tokenizer_type == "NullTokenizer":
        # Up to 0.17 it adds the end-of-document token by itself; later versions have a flag for it.
        size += 0 if hasattr(args, "null_tokenizer_eod_id") else 1
    if size is not None and size <= padded:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        if padded in (size, math.ceil(size / multiple) * multiple):
            return size, "--vocab-size of the run"
    return padded, "padding kept, its size is unknown without --tokenizer"
