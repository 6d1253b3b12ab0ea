"""``python -m torch_plugins.w4a4 quantize`` and ``... report``.

python -m torch_plugins.w4a4 quantize MODEL OUT --activations learned --calibration text.jsonl
python -m torch_plugins.w4a4 quantize MODEL OUT --weights mxfp4 --method rtn --activations none
python -m torch_plugins.w4a4 report MODEL --against OUT --output report.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..export.proof import VerificationError
from ..export.writer import check_output, check_shard_size
from ..feature import ConfigError
from .calibration import read_tokens
from .card import statement
from .folder import Folder
from .quantize import ACTIVATIONS, METHODS, WEIGHTS, Recipe
from .quantize_folder import Job, quantize_folder
from .report import plot, print_table
from .statistics import measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS, REPORT_TOKENS, LENGTH = 262144, 8192, 2048


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def quantize(arguments: argparse.Namespace) -> None:
    """Write a quantized folder and say what it is."""
    output = arguments.output
    check_output(output, arguments.force)
    check_shard_size(arguments.max_shard_size)
    recipe = Recipe(
        arguments.method,
        arguments.activations,
        arguments.group_size,
        arguments.damping,
        arguments.act_order,
        arguments.modules,
        arguments.weights,
    )
    source = Folder(arguments.model, arguments.trust_remote_code)
    if output.exists() and output.samefile(arguments.model):
        raise ConfigError(f"{output}: is the model itself; write elsewhere")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error
    if recipe.method == "rtn" and arguments.calibration is not None:
        raise ConfigError("--calibration: --method rtn uses no tokens; leave it out, or use gptq")
    ids = calibration(arguments, source) if recipe.method == "gptq" else None
    job = Job(
        source,
        output,
        recipe,
        ids,
        DTYPES.get(arguments.dtype),
        arguments.device,
        arguments.force,
        arguments.restart,
        arguments.max_shard_size,
    )
    verdict = quantize_folder(job, say)
    before, after = size(arguments.model), size(output)
    print(f"written: {output}, {after / 1e6:.4g} MB of weights ({before / 1e6:.4g} MB before)")
    print(f"loaded by transformers, fp32 logits: {verdict}")
    print(statement(recipe))


def calibration(arguments: argparse.Namespace, source: Folder) -> torch.Tensor:
    """The tokens of ``--calibration``.

    Raises:
        ConfigError: see :func:`~torch_plugins.w4a4.calibration.read_tokens`.
    """
    if arguments.calibration is None:
        raise ConfigError("--calibration: --method gptq needs tokens; give a file, or --method rtn")
    most = getattr(source.config, "max_position_embeddings", LENGTH)
    length = arguments.seq_length or min(LENGTH, most)
    ids = read_tokens(
        arguments.calibration,
        arguments.model,
        source.config,
        arguments.tokens,
        length,
        arguments.trust_remote_code,
    )
    say(f"calibration: {ids.shape[0]} sequences of {length} tokens")
    return ids


def size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use an integer of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m torch_plugins.w4a4",
        description="Four-bit weights and activations of Hugging Face folders (arXiv 2404.03605).",
    )
    commands = whole.add_subparsers(dest="command", required=True)
    text = "write a folder with four-bit weights, in a format of compressed-tensors"
    add: Any = commands.add_parser("quantize", help=text, description=text).add_argument
    recipe = Recipe()
    add("model", type=Path, help="folder of a Hugging Face model")
    add("output", type=Path, help="folder to write")
    add("--method", choices=METHODS, default=recipe.method, help="default: %(default)s")
    add(
        "--weights",
        choices=WEIGHTS,
        default=recipe.weights,
        help="default: %(default)s. FP4 (mxfp4: blocks of 32 features, nvfp4: of 16) goes with "
        "--method rtn, and with models in bfloat16 or --dtype bfloat16",
    )
    add(
        "--group-size",
        type=int,
        default=recipe.group_size,
        metavar="N",
        help="input features with one scale; -1, the default: a whole row, or a block of FP4",
    )
    add(
        "--activations",
        choices=ACTIVATIONS,
        required=True,
        help="learned: the clips that training found; dynamic-token: a scale for each token; none: "
        "weights only, as vLLM computes int4; dynamic-block: mxfp4, a scale for each 32 features. "
        "mxfp4 weights take dynamic-block or none, nvfp4 weights none",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='for gptq: text, .jsonl with "text", or .safetensors with input_ids',
    )
    add("--tokens", type=positive, default=TOKENS, metavar="N", help="default: %(default)s")
    add(
        "--seq-length",
        type=positive,
        metavar="N",
        help=f"default: {LENGTH}, or what the model takes",
    )
    add("--damping", type=float, default=recipe.damping, help="of GPTQ; default: %(default)s")
    add("--act-order", action="store_true", help="GPTQ takes columns by falling activation")
    add(
        "--modules",
        default=recipe.modules,
        metavar="PATTERNS",
        help="linear layers in the decoder layers: a comma list of shell patterns, '!' excludes",
    )
    add("--device", default="cpu", help="where layers are computed; default: %(default)s")
    add("--dtype", choices=DTYPES, help="of the rest; default: the model's, scales in fp32")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s")
    add("--force", action="store_true", help="replace a model folder at OUTPUT")
    add("--restart", action="store_true", help="forget an interrupted run; else it is continued")
    add("--trust-remote-code", action="store_true", help="run code that the folder carries")
    add_report(commands)
    return whole


def add_report(commands: Any) -> None:
    text = "what makes each linear layer hard to quantize, and what four bits cost it"
    add: Any = commands.add_parser("report", help=text, description=text).add_argument
    add("model", type=Path, help="folder of a Hugging Face model, with or without clips")
    add("--calibration", type=Path, metavar="FILE", help="as for quantize; default: random tokens")
    add("--tokens", type=positive, default=REPORT_TOKENS, metavar="N", help="default: %(default)s")
    add("--seq-length", type=positive, metavar="N", help="as for quantize")
    add("--against", type=Path, metavar="QUANTIZED", help="also errors of this quantized folder")
    add("--modules", default="*", metavar="PATTERNS", help="as for quantize")
    add("--output", type=Path, metavar="PNG", help="draw it too")
    add("--json", action="store_true", help="for machines")
    add("--trust-remote-code", action="store_true", help="run code that the folder carries")


def report(arguments: argparse.Namespace) -> None:
    """Print the table, or JSON, and draw it."""
    source = Folder(arguments.model, arguments.trust_remote_code)
    against = None
    if arguments.against is not None:
        against = Folder(arguments.against, arguments.trust_remote_code, quantized=True)
    if arguments.calibration is not None:
        ids = calibration(arguments, source)
    else:
        most = getattr(source.config, "max_position_embeddings", LENGTH)
        length = arguments.seq_length or min(256, most)
        draw = torch.Generator().manual_seed(0)
        shape = max(1, arguments.tokens // length), length
        ids = torch.randint(source.config.vocab_size, shape, generator=draw)
    rows = measure(source, ids, against, arguments.modules, say)
    if arguments.output is not None:
        plot(rows, arguments.output)
    if arguments.json:
        print(json.dumps({"tokens": ids.numel(), "layers": rows}, indent=2))
        return
    print_table(rows, ids.numel())
    if arguments.output is not None:
        print(f"written: {arguments.output}")


def main(argv: list[str] | None = None) -> None:
    """Run one command; what is wrong with its options goes to stderr, exit code 2."""
    whole = parser()
    arguments = whole.parse_args(argv)
    try:
        {"quantize": quantize, "report": report}[arguments.command](arguments)
    except ConfigError as error:
        whole.error(str(error))
    except VerificationError as error:
        sys.exit(f"error: {error}")
