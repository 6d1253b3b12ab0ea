"""Tensors of a Hugging Face folder -> Megatron's, each made when it is written.

The exporter's rules say what becomes of a tensor of Megatron. All that they do to a Llama is to
share out its rows, so a rule applied to the numbers of the rows tells where each row comes from.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_plugins.export.mapping import Rule, layer_rules, model_rules
from megatron_plugins.export.save import Source, Stack
from torch_plugins.export.folder import Folder

LAYER_STATES = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
MODEL_STATES = ("decoder.final_layernorm",)
"""Modules of the local and the TransformerEngine spec that ask for their extra state, which is
empty but for FP8."""


def megatron_tensors(
    folder: Folder, args: Namespace, say: Callable[[str], None]
) -> dict[str, Source | Stack]:
    """The tensors of the checkpoint by key, layers stacked as in Megatron's own.

    Args:
        say: is told when a layer begins.
    """
    tensors: dict[str, Source | Stack] = {}
    for rule in model_rules(folder.decoder, args):
        tensors[rule.source] = _source(folder, rule, "")
    count = args.num_layers
    layers: dict[str, list[Source]] = {}
    for layer in range(count):
        prefix = f"model.layers.{layer}."
        for number, rule in enumerate(layer_rules(folder.decoder, args, layer)):
            told = "" if number else f"layer {layer + 1} of {count}"
            source = _source(folder, rule, prefix, partial(say, told) if told else None)
            layers.setdefault(f"decoder.layers.{rule.source}", []).append(source)
    return tensors | {key: Stack(tuple(sources)) for key, sources in layers.items()}


def empty_states(num_layers: int) -> dict[str, Callable[[], io.BytesIO]]:
    """The extra states that Megatron asks for, all of them None."""
    keys = [f"{module}._extra_state/shard_0_1" for module in MODEL_STATES]
    keys += [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in range(num_layers)
        for module in LAYER_STATES
    ]
    return dict.fromkeys(keys, _nothing)


def _nothing() -> io.BytesIO:
    file = io.BytesIO()
    torch.save([None], file)
    return file


def _source(
    folder: Folder, rule: Rule, prefix: str, begins: Callable[[], None] | None = None
) -> Source:
    names = [prefix + target for target in rule.targets]
    first = folder.shapes[names[0]]
    rows = sum(folder.shapes[name][0] for name in names)

    def read() -> Tensor:
        if begins is not None:
            begins()
        return _assemble(folder, rule, names, rows)

    return Source((rows, *first[1:]), folder.dtype, read)


def _assemble(folder: Folder, rule: Rule, names: list[str], rows: int) -> Tensor:
    """One tensor of Megatron; beside it, one of the folder's at a time is in memory."""
    if len(names) == 1:
        return folder.read(names[0])
    places = rule.convert(torch.arange(rows))
    result = torch.empty(rows, *folder.shapes[names[0]][1:], dtype=folder.dtype)
    for name, place in zip(names, places, strict=True):
        result[place] = folder.read(name)
    return result
