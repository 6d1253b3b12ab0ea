"""Real text that every machine has: Python's own standard library, in Megatron's indexed format.

    python prepare_data.py --output out/ladder_residual/data

Reads the sources of the running interpreter's standard library and the prose of ``pydoc_data``,
trains a byte-level BPE on the spot, and writes

    tokenizer/                     a Hugging Face tokenizer folder
    train.bin train.idx            token ids, one document per file or topic, each closed by the
    valid.bin valid.idx            end-of-text token; whole documents are held out for validation
    data.json                      what was read, and the counts

Nothing is downloaded. Documents are read in sorted order and held out by a hash of their name, so
one interpreter always gives the same data; a second call with the same interpreter does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 40
# Bundled wheels, tests, and tables of code points: files that are not prose or programs.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata",)


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is validation text: one in :data:`HELD_OUT_ONE_IN`, by name."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Corpus:
    """How much text there is, and which; kept in ``data.json``."""

    vocab_size: int
    documents: int
    train_tokens: int
    valid_tokens: int
    fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        return cls(**json.loads((folder / "data.json").read_text()))


def standard_library(root: Path) -> Iterator[Document]:
    """Python sources below ``root``, sorted by path; files that are not UTF-8 are left out."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def language_reference() -> Iterator[Document]:
    """The topics that ``help()`` shows: chapters of Python's language reference."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", text)


def read_documents(limit: int | None = None) -> list[Document]:
    """The whole corpus, or every n-th document of it so that about ``limit`` remain."""
    documents = [*standard_library(Path(sysconfig.get_path("stdlib"))), *language_reference()]
    step = 1 if limit is None else max(1, len(documents) // limit)
    return documents[::step]


def fingerprint(documents: Iterable[Document], vocab_size: int) -> str:
    """Identity of a corpus: its texts, the interpreter, and how they are tokenised."""
    digest = hashlib.sha256(f"{sys.version} {vocab_size} {HELD_OUT_ONE_IN}".encode())
    for document in documents:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()[:16]


def train_tokenizer(documents: list[Document], vocab_size: int, folder: Path) -> None:
    """Byte-level BPE of ``vocab_size`` entries, saved so that ``AutoTokenizer`` loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents if not d.held_out), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def write_indexed(documents: list[Document], tokenizer_folder: Path, prefix: Path) -> int:
    """Write one ``.bin``/``.idx`` pair and return its number of tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens = 0
    for encoding in tokenizer.encode_batch([d.text for d in documents]):
        ids = [*encoding.ids, end]
        builder.add_document(torch.tensor(ids), [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def prepare(output: Path, vocab_size: int = 4096, limit: int | None = None) -> Corpus:
    """Build the corpus in ``output``, or return what is there when it is the same corpus.

    Args:
        output: folder of the data; created when missing.
        vocab_size: entries of the tokenizer, the end-of-text token among them.
        limit: keep about so many documents.
    """
    documents = read_documents(limit)
    identity = fingerprint(documents, vocab_size)
    summary = output / "data.json"
    if summary.exists():
        with contextlib.suppress(ValueError, TypeError):  # written by another version of this file
            corpus = Corpus.load(output)
            if corpus.fingerprint == identity:
                return corpus
        summary.unlink()

    output.mkdir(parents=True, exist_ok=True)
    tokenizer = output / "tokenizer"
    train_tokenizer(documents, vocab_size, tokenizer)
    split = {
        name: write_indexed(
            [d for d in documents if d.held_out == held_out], tokenizer, output / name
        )
        for name, held_out in (("train", False), ("valid", True))
    }
    corpus = Corpus(
        vocab_size=vocab_size,
        documents=len(documents),
        train_tokens=split["train"],
        valid_tokens=split["valid"],
        fingerprint=identity,
    )
    summary.write_text(json.dumps(dataclasses.asdict(corpus), indent=2) + "\n")
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--documents", type=int, help="keep about so many; default: all")
    arguments = parser.parse_args()
    corpus = prepare(arguments.output, arguments.vocab_size, arguments.documents)
    print(json.dumps(dataclasses.asdict(corpus), indent=2))


if __name__ == "__main__":
    main()
