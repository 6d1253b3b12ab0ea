"""``python -m megatron_plugins.export_hf --load CKPT --output DIR``: a torch_dist checkpoint to a
Hugging Face folder, on any machine, and only if its logits are those of the trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_plugins.config import ConfigError


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m megatron_plugins.export_hf",
        description="Export a Megatron torch_dist checkpoint to Hugging Face format. Needs neither "
        "Megatron nor a GPU; where Megatron is installed, its own model is what the export is "
        "compared with.",
    )
    result.add_argument(
        "--load", type=Path, required=True, help="Folder of Megatron's --save, or one iter_ folder."
    )
    result.add_argument("--output", type=Path, required=True, help="Folder to make.")
    result.add_argument(
        "--tokenizer",
        type=Path,
        help="Folder or tokenizer.json to copy; its size is that of the exported vocabulary.",
    )
    result.add_argument("--iteration", type=int, help="Default: the latest.")
    result.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="Of the weights. Default: keep the checkpoint's.",
    )
    result.add_argument("--max-shard-size", default="5GB", help="Of one weight file. Default: 5GB.")
    result.add_argument(
        "--force",
        action="store_true",
        help="Replace a model folder at --output, once the new one is complete and verified.",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 exported, 1 the export failed its proof, 2 the input cannot be used."""
    args = parser().parse_args(argv)
    from megatron_plugins.export.run import export
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
