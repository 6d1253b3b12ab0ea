"""Tokenizer files of an export."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError

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
