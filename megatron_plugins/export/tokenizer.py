"""The vocabulary without Megatron's padding."""

from __future__ import annotations

import math
from argparse import Namespace

from torch_plugins.config import ConfigError
from torch_plugins.export.tokenizer import Tokenizer


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
