"""Checkpoints of one model as the start of another, on any machine.

``python -m megatron_plugins.convert --from llama DIR --to CKPT --ladder-layers last:16``: a Hugging
Face folder as a torch_dist checkpoint; ``--from megatron CKPT --to DIR`` is the way back.

``python -m megatron_plugins.convert --load STOCK --save NEW --cla-sharing-factor 2``: a standard
torch_dist checkpoint as the start of a Cross-Layer Attention model.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch_plugins.config import ConfigError, CrossLayerAttention, Feature, LadderResidual

KINDS = ("llama", "granite", "hf", "megatron")
OF_THE_FORM = {
    "from": ("from", "to", "tokenizer", "no_verify"),
    "load": ("load", "save", "kv"),
}
"""Options that belong to one form of the command alone, those apart that name features."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m megatron_plugins.convert",
        usage="%(prog)s --from {llama,granite,hf} DIR --to CKPT [--ladder-layers SPEC]\n"
        "       %(prog)s --from megatron CKPT --to DIR [--ladder-layers none] [--tokenizer PATH]\n"
        "       %(prog)s --load STOCK --save NEW --cla-... [--kv {mean,first}]",
        description="Make a checkpoint the start of another model, for retraining. Needs neither "
        "Megatron nor a GPU. A new torch_dist checkpoint takes memory for one layer, and is a "
        "release: weights only, training starts at iteration 0, at any tensor and pipeline "
        "parallel size.",
    )
    folders = result.add_argument_group(
        "Hugging Face folders",
        "A Llama or Granite folder becomes a torch_dist checkpoint, whose logits without the "
        "ladder are compared with those of transformers; and back, as python -m "
        "megatron_plugins.export_hf does, which has more options.",
    )
    folders.add_argument(
        "--from",
        nargs=2,
        metavar=("KIND", "PATH"),
        help="llama, granite, or hf for whichever the folder's config.json says; or megatron, and "
        "a folder of Megatron's --save.",
    )
    folders.add_argument("--to", type=Path, metavar="PATH", help="The folder to make.")
    _add_feature(folders, LadderResidual)
    folders.add_argument(
        "--no-verify", action="store_true", help="Do not compare logits with transformers'."
    )
    folders.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="To copy, on the way to Hugging Face."
    )
    sharing = result.add_argument_group(
        "Cross-Layer Attention", "A standard checkpoint loses keys and values."
    )
    sharing.add_argument(
        "--load", type=Path, metavar="PATH", help="Folder of Megatron's --save, or one iter_ folder"
    )
    sharing.add_argument("--save", type=Path, metavar="PATH", help="New folder for --load.")
    _add_feature(sharing, CrossLayerAttention)
    sharing.add_argument(
        "--kv",
        choices=("mean", "first"),
        help="Keys and values of a producer: the mean over its group, or its own. Default: first.",
    )
    result.add_argument("--iteration", type=int, help="Of a Megatron checkpoint. Default: latest.")
    return result


def _add_feature(group: Any, feature: type[Feature]) -> None:
    group.add_argument(feature.flag(), action="store_true", help="Implied by any of these:")
    for field in fields(feature):
        default = "" if field.default is None else f" Default: {field.default}."
        group.add_argument(
            feature.flag(field.name),
            type=int if "int" in str(field.type) else str,
            choices=field.metadata["choices"],
            metavar=field.metadata["metavar"],
            help=f"{field.metadata['help']}{default}",
        )


def feature_of(args: dict[str, Any], feature: type[Feature]) -> Any:
    """The feature as it was typed, or None."""
    names = {name: feature.dest(name) for name in (field.name for field in fields(feature))}
    given = {name: args[dest] for name, dest in names.items() if args[dest] is not None}
    return feature(**given) if given or args[feature.key()] else None


def share(
    load: Path, save: Path, feature: CrossLayerAttention, kv: str, iteration: int | None = None
) -> str:
    """Write ``save`` from the standard checkpoint in ``load``; returns what was done, for the user.

    Raises:
        ConfigError: an input cannot be used; nothing was written.
    """
    from megatron_plugins.arguments import set_features
    from megatron_plugins.cross_layer_attention import conversion, validate
    from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
    from megatron_plugins.export.save import check_place, save_release
    from megatron_plugins.hybrid import pattern

    check_place(save)
    checkpoint = Checkpoint(find_iteration(load, iteration))
    args = checkpoint.args
    if pattern(args) is not None:
        raise ConfigError(
            f"{checkpoint.folder} is a hybrid model's (--hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern}): only those of GPT models are converted; train it with "
            f"{feature.flag()} from the start"
        )
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


def export(
    load: Path, to: Path, ladder: LadderResidual | None, tokenizer: Path | None, **options: Any
) -> str:
    """Write the Hugging Face folder ``to`` from the checkpoint in ``load``, its ladder left out
    where ``ladder`` is one without layers.

    Raises:
        ConfigError: an input cannot be used; nothing was written.
        VerificationError: the folder's logits are not the checkpoint's; nothing is left.
    """
    from megatron_plugins.export.run import export as export_folder
    from megatron_plugins.export.save import check_new

    if ladder is not None and ladder.layers != "none":
        raise ConfigError(
            f"{LadderResidual.flag('layers')} {ladder.layers} with --from megatron: the "
            "checkpoint's layers are kept, or 'none' leaves the ladder out"
        )
    check_new(to)
    without = [LadderResidual.key()] if ladder else []
    model, verdict = export_folder(
        load, to, tokenizer, force=to.exists(), without=without, **options
    )
    return f"logits equal: {verdict}\nconverted {load} to {to} as {model}"


def run(args: dict[str, Any]) -> str:
    """What the words of the command ask for."""
    _check_form(args)
    ladder, sharing = (feature_of(args, kind) for kind in (LadderResidual, CrossLayerAttention))
    if args["load"] is not None:
        if sharing is None:
            raise ConfigError(
                f"nothing to convert to: give {CrossLayerAttention.flag()} or its options"
            )
        kv = args["kv"] or "first"
        return share(args["load"], args["save"], sharing, kv, args["iteration"])
    kind, source = args["from"][0], Path(args["from"][1])
    if not source.is_dir():
        raise ConfigError(f"--from {kind} {source}: no such folder")
    if kind == "megatron":
        if args["no_verify"]:
            raise ConfigError("--no-verify with --from megatron: logits are always compared")
        return export(source, args["to"], ladder, args["tokenizer"], iteration=args["iteration"])
    for name in ("iteration", "tokenizer"):
        if args[name] is not None:
            raise ConfigError(f"--{name} belongs to --from megatron, not to --from {kind}")
    from megatron_plugins.from_hf.run import convert

    return convert(kind, source, args["to"], ladder, not args["no_verify"])


def _check_form(args: dict[str, Any]) -> None:
    """Raise for words of both forms of the command, or of half a one."""
    form, other = ("from", "load") if args["from"] is not None else ("load", "from")
    second = OF_THE_FORM[form][1]
    if args[form] is None:
        raise ConfigError("give --from KIND PATH --to PATH, or --load PATH --save PATH")
    mixed = [name for name in OF_THE_FORM[other] if args[name] not in (None, False)]
    if mixed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in mixed)
        raise ConfigError(f"--{form} with {flags}: these belong to --{other}")
    if args[second] is None:
        raise ConfigError(f"--{form} needs --{second}")
    if form == "from" and args["from"][0] not in KINDS:
        raise ConfigError(f"--from {args['from'][0]}: use one of {', '.join(KINDS)}")
    wrong, right = (
        (CrossLayerAttention, "--load CKPT --save NEW")
        if form == "from"
        else (LadderResidual, "the flags of the run: a ladder has the weights of a standard model")
    )
    if feature_of(args, wrong) is not None:
        remedy = "convert once more, with" if form == "from" else "give it with"
        raise ConfigError(f"{wrong.flag()} with --{form}: {remedy} {right}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 converted, 1 the result failed its proof, 2 the input cannot be used."""
    args = vars(parser().parse_args(argv))
    from torch_plugins.export.proof import VerificationError

    try:
        print(run(args))
    except ConfigError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"convert: {error}; nothing was left", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
