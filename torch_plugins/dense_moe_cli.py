"""``python -m torch_plugins.dense_moe table`` and ``... utilization``.

    python -m torch_plugins.dense_moe table --top-k 6
    python -m torch_plugins.dense_moe utilization MODEL_DIR --text FILE --output heat.png

The table needs transformers, utilization also a tokenizer in the model's folder, and matplotlib for
its picture; both are prettier with rich. Shapes: N experts, L layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch_plugins.config import ConfigError
from torch_plugins.dense_moe import Utilization, router_logits, utilization
from torch_plugins.dense_moe_config import DENSE_MOE_PRESETS, DenseMoEPreset
from torch_plugins.power_lr_cli import positive, show, token_count

PRINTED = {"1b": (1067, 1017), "3b": (2846, 2705), "6b": (6343, 6186)}
"""Millions of parameters that the paper prints of a model and of its dense twin (table 1)."""
PRINTED_ELSEWHERE = {"3b": 2793}
"""In table 5, of the same model."""
SIZES = {
    "hidden_size": "width of the model",
    "num_layers": "layers",
    "attention_experts": "attention experts of a layer; 0: ordinary attention",
    "heads": "query heads of one attention expert, which are the key-value heads",
    "head_dim": "width of a head",
    "num_experts": "MLP experts of a layer; 0: an ordinary MLP",
    "ffn_hidden_size": "width of one expert",
}
COUNTED = {"mlp-512": {"router": "mlp"}, "linear": {"router": "linear"}, "twin": None}


@dataclass(frozen=True)
class Count:
    """Parameters in the matrices of all layers."""

    parameters: int
    routers: int
    active: int
    """Of one token with ``top_k`` MLP experts; everything else of the layers counts."""


def count(sizes: DenseMoEPreset, gated: bool, router: Mapping[str, Any] | None, k: int) -> Count:
    """Count the matrices of a decoder on the meta device, where they take no memory.

    Embeddings, the head and norms are left out.

    Args:
        router: the router's options; None for the dense twin.
        k: MLP experts of a token.
    """
    import torch

    from torch_plugins.hf import PluginDecoderConfig, PluginDecoderModel

    experts = {"num_experts": sizes.num_experts, "attention_experts": sizes.attention_experts}
    config = PluginDecoderConfig(
        vocab_size=1,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=max(1, sizes.attention_experts) * sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.head_dim,
        intermediate_size=max(1, sizes.num_experts) * sizes.ffn_hidden_size,
        mlp_gated=gated,
        position_embedding_type="none",
        dense_moe=None if router is None else {**experts, "gated": gated, **router},
    )
    with torch.device("meta"):
        layers = PluginDecoderModel(config).layers
    matrices = {name: p.numel() for name, p in layers.named_parameters() if p.dim() == 2}
    total = sum(matrices.values())
    routers = sum(size for name, size in matrices.items() if ".router." in name)
    experts_own = sum(size for name, size in matrices.items() if ".mlp." in name)
    experts_own -= sum(size for name, size in matrices.items() if ".mlp.router." in name)
    if router is None or not sizes.num_experts:
        return Count(total, routers, total)
    idle = experts_own // sizes.num_experts * (sizes.num_experts - k)
    return Count(total, routers, total - idle)


def models(arguments: argparse.Namespace) -> dict[str, DenseMoEPreset]:
    """The models that the options name.

    Raises:
        ConfigError: sizes that are missing, or that several presets would share.
    """
    own = {name: getattr(arguments, name) for name in SIZES}
    own = {name: value for name, value in own.items() if value is not None}
    names = arguments.preset or ([] if own else list(DENSE_MOE_PRESETS))
    if not own:
        return {name: DENSE_MOE_PRESETS[name] for name in names}
    if len(names) > 1:
        raise ConfigError(f"--preset {' '.join(names)}: sizes beside it change one preset; name it")
    if names:
        return {f"{names[0]}, changed": replace(DENSE_MOE_PRESETS[names[0]], **own)}
    missing = [spelled(name) for name in SIZES if name not in own]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; give every size, or --preset as a base")
    return {"custom": DenseMoEPreset(**own, mi_weight_attention=0, mi_weight_mlp=0)}


def spelled(name: str) -> str:
    """The flag of a size."""
    return f"--{name.replace('_', '-')}"


def printed(model: str, kind: str) -> list[int]:
    """What the paper prints of a model, in millions; several numbers where it contradicts itself.

    Those of linear routers are the same: the paper does not say which it has.
    """
    if model not in PRINTED:
        return []
    with_experts, twin = PRINTED[model]
    if kind == "twin":
        return [twin]
    return [with_experts, *([PRINTED_ELSEWHERE[model]] if model in PRINTED_ELSEWHERE else [])]


def table(arguments: argparse.Namespace) -> None:
    """Print parameter counts beside those that the paper prints."""
    rows = []
    for model, sizes in models(arguments).items():
        k = sizes.num_experts if arguments.top_k is None else arguments.top_k
        if k > sizes.num_experts:
            raise ConfigError(f"--top-k {k}: {model} has {sizes.num_experts} MLP experts")
        for kind, router in COUNTED.items():
            found = count(sizes, arguments.gated, router, k)
            rows.append({"model": model, "kind": kind, "top_k": k, **asdict(found)})
            rows[-1]["paper_millions"] = [] if arguments.gated else printed(model, kind)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    header = [
        "model",
        "routers",
        "params",
        "in routers",
        "paper",
        "ours - paper",
        "active",
        "share",
    ]
    title = "Millions of parameters, without embeddings, head and norms (arXiv 2404.05567)"
    show(title, header, [cells(row) for row in rows], last_apart=False)
    print(
        "The paper prints two counts of the 3B model: 2846M in table 1, 2793M in table 5.\n"
        "Twin: a dense model of the same width. Active: "
        f"{arguments.top_k or 'all'} MLP experts of a token, all attention experts."
    )


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; counts in millions."""
    own = row["parameters"] / 1e6
    paper = row["paper_millions"]
    return [
        row["model"],
        row["kind"],
        f"{own:.1f}",
        f"{row['routers'] / 1e6:.1f}",
        " / ".join(map(str, paper)) or "-",
        " / ".join(f"{own - value:+.1f}" for value in paper) or "-",
        f"{row['active'] / 1e6:.1f}",
        f"{row['active'] / row['parameters']:.1%}",
    ]


def observe(arguments: argparse.Namespace) -> None:
    """Run a model over a text; print what its routers do, and draw it."""
    import torch

    model, tokens = load(arguments)
    seen: dict[str, list[Any]] = {}
    hooks = [
        module.register_forward_pre_hook(recorder(seen.setdefault(name, [])))
        for name, module in model.named_modules()
        if name.endswith(".router")
    ]
    with torch.inference_mode():
        for start in range(0, len(tokens), arguments.sequence_length):
            model(torch.tensor([tokens[start : start + arguments.sequence_length]]))
    for hook in hooks:
        hook.remove()
    found: dict[tuple[int, str], Utilization] = {}
    for name, logits in seen.items():
        layer, module = name.removesuffix(".router").split(".")[-2:]
        kind = {"mlp": "mlp", "self_attn": "attention"}[module]
        found[int(layer), kind] = utilization(torch.cat(logits), arguments.threshold)
    if arguments.output is not None:
        try:
            draw(found, arguments.threshold, arguments.output)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--output {arguments.output}: {error}") from None
    report(found, len(tokens), arguments)


def load(arguments: argparse.Namespace) -> tuple[Any, list[int]]:
    """The model and the text's tokens.

    Raises:
        ConfigError: a folder without experts or tokenizer, or a text without tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import torch_plugins.hf  # noqa: F401  (registers the decoder)

    folder = arguments.model_dir
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json there; give an exported model's folder")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "dense_moe", None) is None:
        raise ConfigError(f"{folder}: a model without dense_moe has no routers to look at")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: has no tokenizer, and random ids would say nothing of a text; save the "
            f"one that the model was trained with into the folder ({str(error).splitlines()[0]})"
        ) from None
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {arguments.text}: {error}") from None
    tokens = tokenizer(text)["input_ids"][: arguments.tokens]
    if not tokens:
        raise ConfigError(f"--text {arguments.text}: the tokenizer finds no token in it")
    if (largest := max(tokens)) >= config.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer says {largest}, the model knows {config.vocab_size} tokens"
        )
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return loaded.eval(), tokens


def recorder(into: list[Any]) -> Callable[[Any, tuple[Any, ...]], None]:
    """A hook that keeps a router's logits, ``[tokens, N]``: its output has the scores only."""

    def record(router: Any, inputs: tuple[Any, ...]) -> None:
        hidden = None if router.hidden is None else router.hidden.weight
        into.append(router_logits(inputs[0], router.weight, hidden).flatten(0, -2).float())

    return record


def report(
    found: dict[tuple[int, str], Utilization], tokens: int, arguments: argparse.Namespace
) -> None:
    """Print one row for a router."""
    ordered = sorted(found.items())
    if arguments.json:
        rows = [{"layer": layer, "kind": kind, **numbers(own)} for (layer, kind), own in ordered]
        told = {"tokens": tokens, "threshold": arguments.threshold, "routers": rows}
        print(json.dumps(told, indent=2))
        return
    cells = [
        [
            str(layer),
            kind,
            f"{own.mutual_information:.4f}",
            f"{own.conditional_entropy:.4f}",
            f"{own.active_N.mean():.1%}",
            f"{own.share_N.max() * len(own.share_N):.2f}",
        ]
        for (layer, kind), own in ordered
    ]
    title = (
        f"Routers over {tokens} tokens; active: pairs of token and expert above the threshold "
        f"{arguments.threshold:g} / N; information and entropy in nats"
    )
    header = ["layer", "kind", "MI", "H(e|x)", "active", "largest N p(e)"]
    show(title, header, cells, last_apart=False)
    if arguments.output is not None:
        print(f"written: {arguments.output}")


def numbers(own: Utilization) -> dict[str, Any]:
    """A router for machines; ``active`` is the mean over its experts."""
    told = {name: value.tolist() for name, value in own._asdict().items()}
    return {**told, "active": own.active_N.mean().item()}


def draw(found: dict[tuple[int, str], Utilization], threshold: float, path: Path) -> None:
    """Heat maps of layers by experts: ``N p(e)``, and the share of tokens that keep an expert."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import torch

    kinds = sorted({kind for _, kind in found})
    figure, panels = plt.subplots(
        len(kinds),
        2,
        figsize=(11, 1 + 3.2 * len(kinds)),
        dpi=120,
        squeeze=False,
        layout="constrained",
    )
    for row, kind in zip(panels, kinds, strict=True):
        layers = sorted(layer for layer, own in found if own == kind)
        share = torch.stack([found[layer, kind].share_N for layer in layers])
        active = torch.stack([found[layer, kind].active_N for layer in layers])
        share = share * share.shape[-1]
        for axes, values, title, largest in (
            (row[0], share, "N p(e), 1 is balanced", max(2.0, share.max().item())),
            (row[1], active, f"share of tokens with N S > {threshold:g}", 1.0),
        ):
            image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=largest)
            axes.set_title(f"{kind}: {title}")
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            figure.colorbar(image, ax=axes)
    figure.savefig(path)
    plt.close(figure)


def fraction(text: str) -> float:
    """Read a threshold, at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number of at least 0 and below 1")
    return value


def size(text: str) -> int:
    """Read an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: use an integer of at least 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Both commands."""
    whole = argparse.ArgumentParser(
        prog="python -m torch_plugins.dense_moe",
        description="DS-MoE: sizes of models, and what trained routers do (arXiv 2404.05567).",
    )
    commands = whole.add_subparsers(dest="command", required=True)
    text = "parameter counts of presets or of sizes of one's own, and those of the paper"
    add = commands.add_parser("table", help=text, description=text).add_argument
    add("--preset", nargs="+", choices=tuple(DENSE_MOE_PRESETS), help="default: all")
    for name, meaning in SIZES.items():
        kind = size if name in ("num_experts", "attention_experts") else positive
        add(spelled(name), type=kind, metavar="N", help=meaning)
    add("--gated", action="store_true", help="SwiGLU experts, of three matrices")
    add("--top-k", type=positive, metavar="K", help="MLP experts of a token; default: all")
    add("--json", action="store_true", help="for machines")

    text = "how the routers of a Hugging Face folder spread a text's tokens"
    add = commands.add_parser("utilization", help=text, description=text).add_argument
    add("model_dir", type=Path, metavar="MODEL_DIR")
    add("--text", type=Path, required=True, metavar="FILE")
    add("--tokens", type=token_count, metavar="N", help="of the text's beginning; default: all")
    add("--sequence-length", type=positive, default=512, metavar="N", help="default: %(default)s")
    add("--threshold", type=fraction, default=0.48, metavar="EPS", help="default: %(default)s")
    add("--output", type=Path, metavar="PNG", help="heat map of layers and experts")
    add("--json", action="store_true", help="for machines")
    return whole


def main(argv: list[str] | None = None) -> None:
    """Run one command; what is wrong with its options goes to stderr, exit code 2."""
    whole = parser()
    arguments = whole.parse_args(argv)
    try:
        {"table": table, "utilization": observe}[arguments.command](arguments)
    except ConfigError as error:
        whole.error(str(error))
    except ImportError as error:
        whole.error(f"{error}: pip install transformers, and matplotlib for --output")
