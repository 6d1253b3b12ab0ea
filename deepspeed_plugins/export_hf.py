"""``python -m deepspeed_plugins.export_hf CKPT OUT``: a DeepSpeed checkpoint of a converted model
to a Hugging Face folder, only if its logits are those of the trained weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_plugins.config import ConfigError


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m deepspeed_plugins.export_hf",
        description="Export a DeepSpeed checkpoint of a model with plugin features to Hugging Face "
        "format: ZeRO 0 to 3, any number of ranks, without a GPU.",
    )
    result.add_argument("load", type=Path, help="Folder of save_checkpoint, or of one tag in it.")
    result.add_argument("output", type=Path, help="Folder to make.")
    result.add_argument("--tag", help="Default: the latest.")
    result.add_argument("--tokenizer", type=Path, help="Folder or tokenizer.json to copy.")
    result.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="Of the weights. Default: keep that of the training.",
    )
    result.add_argument("--max-shard-size", default="5GB", help="Of one weight file. Default: 5GB.")
    result.add_argument(
        "--force",
        action="store_true",
        help="Replace a model folder at OUTPUT, once the new one is complete and verified.",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 exported, 1 the export failed its proof, 2 the input cannot be used."""
    args = parser().parse_args(argv)
    from deepspeed_plugins.export.run import export
    from torch_plugins.export.proof import VerificationError

    try:
        model_type, verdict = export(**vars(args))
    except ConfigError as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"export_hf: {error}; nothing was left at {args.output}", file=sys.stderr)
        return 1
    print(f"logits equal: {verdict}")
    print(f"exported {args.load} to {args.output} as {model_type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
