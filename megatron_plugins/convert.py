"""``python -m megatron_plugins.convert --load STOCK --save NEW --cla-sharing-factor 2``: a standard
torch_dist checkpoint as the start of a Cross-Layer Attention model, on any machine."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from torch_plugins.config import ConfigError, CrossLayerAttention


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m megatron_plugins.convert",
        description="Initialise a standard Megatron checkpoint into Cross-Layer Attention, for "
        "uptraining. Needs neither Megatron nor a GPU. The new checkpoint is a release: weights "
        "only, training starts at iteration 0.",
    )
    result.add_argument(
        "--load", type=Path, required=True, help="Folder of Megatron's --save, or one iter_ folder."
    )
    result.add_argument("--save", type=Path, required=True, help="New folder for --load.")
    result.add_argument("--iteration", type=int, help="Default: the latest.")
    result.add_argument(
        CrossLayerAttention.flag(), action="store_true", help="Implied by any of these:", dest="on"
    )
    for field in fields(CrossLayerAttention):
        default = "" if field.default is None else f" Default: {field.default}."
        result.add_argument(
            CrossLayerAttention.flag(field.name),
            dest=field.name,
            type=int if "int" in str(field.type) else str,
            choices=field.metadata["choices"],
            metavar=field.metadata["metavar"],
            help=f"{field.metadata['help']}{default}",
        )
    result.add_argument(
        "--kv",
        choices=("mean", "first"),
        default="first",
        help="Keys and values of a producer: the mean over its group, or its own. Default: first.",
    )
    return result


def convert(
    load: Path, save: Path, feature: CrossLayerAttention, kv: str, iteration: int | None = None
) -> str:
    """Write ``save`` from the checkpoint in ``load``; returns what was done, for the user.

    Raises:
        ConfigError: an input cannot be used; nothing was written.
    """
    from megatron_plugins.arguments import set_features
    from megatron_plugins.cross_layer_attention import conversion, validate
    from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
    from megatron_plugins.export.save import check_place, save_release

    check_place(save)
    checkpoint = Checkpoint(find_iteration(load, iteration))
    args = checkpoint.args
    validate(args, feature)
    new = conversion.convert(checkpoint, feature, kv)
    set_features(args, {feature.key(): feature})
    for name in ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"):
        setattr(args, name, 0)
    save_release(save, new.tensors, new.states, args)
    producers = sorted(set(feature.resolve(args.num_layers)))
    size = sum(math.prod(source.shape) for source in new.tensors.values())
    return (
        f"converted {checkpoint.folder} to {save}: {len(producers)} of {args.num_layers} layers "
        f"keep keys and values ({', '.join(map(str, producers))}; {kv}), {size:,} parameters"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 converted, 2 the input cannot be used."""
    args = vars(parser().parse_args(argv))
    names = [field.name for field in fields(CrossLayerAttention)]
    given = {name: value for name in names if (value := args.pop(name)) is not None}
    try:
        if not args.pop("on") and not given:
            raise ConfigError(
                f"nothing to convert to: give {CrossLayerAttention.flag()} or its options"
            )
        print(convert(feature=CrossLayerAttention(**given), **args))
    except ConfigError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
