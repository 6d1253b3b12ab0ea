"""A standard checkpoint initialised into Cross-Layer Attention, for uptraining.

Consumers lose their projections of keys and values; their producer keeps its own (``first``) or
gets the mean over the group (``mean``), weights and biases alike. A norm of their own starts as a
copy of the norm of the queries, which is the same function.

Shapes: H query heads, K key-value heads, G = H / K, P head dimension, D hidden size.
"""

from __future__ import annotations

import io
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_plugins.cross_layer_attention.groups import Role, roles
from megatron_plugins.export.checkpoint import Checkpoint
from megatron_plugins.export.mapping import OPTIMIZER, UNFUSED_NORMS
from megatron_plugins.export.save import Source
from torch_plugins.config import ConfigError, CrossLayerAttention

POOLS = ("mean", "first")

QKV, KV = "self_attention.linear_qkv.", "self_attention.linear_kv."
KEY_NORM = "self_attention.k_layernorm."
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_SHARD = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")

Read = Callable[[], Tensor]
State = Callable[[], io.BytesIO]


@dataclass
class Conversion:
    """The tensors and states of the new checkpoint, by key, read when they are written."""

    tensors: dict[str, Source]
    states: dict[str, State]


def convert(checkpoint: Checkpoint, feature: CrossLayerAttention, pool: str) -> Conversion:
    """What the checkpoint becomes.

    Raises:
        ConfigError: its layers are not what its arguments say, or share keys already.
    """
    args = checkpoint.args
    if getattr(args, CrossLayerAttention.key(), False):
        raise ConfigError(f"{checkpoint.folder}: its layers share keys and values already")
    own = roles(feature, args.num_layers)
    layers = Layers(checkpoint)
    result = Conversion({}, {})
    for key in layers.outside:
        result.tensors[key] = layers.source(key)
    for role in own:
        group = [r.index for r in own if r.producer == role.index] if pool == "mean" else []
        for name in layers.names(role.index):
            for new, source in _layer_tensor(layers, args, role, group, name):
                result.tensors[f"decoder.layers.{role.index}.{new}"] = source
    for key in checkpoint.states:
        for new in _numbered_state(key, own):
            result.states[new] = partial(checkpoint.read_bytes, key)
    return result


class Layers:
    """Tensors of a checkpoint by layer, whether it stacks or numbers them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.outside: list[str] = []
        self._key: dict[tuple[int, str], tuple[str, int | None]] = {}
        for key in checkpoint.tensors:
            match = _LAYER.fullmatch(key)
            if key.startswith(OPTIMIZER):
                continue
            if match is None:
                self.outside.append(key)
            elif match[1] is not None:
                self._key[int(match[1]), match[2]] = key, None
            else:
                for layer in range(checkpoint.tensors[key][0]):
                    self._key[layer, match[2]] = key, layer

    def names(self, layer: int) -> list[str]:
        return [name for index, name in self._key if index == layer]

    def read(self, layer: int, name: str) -> Tensor:
        return self.checkpoint.read(*self._key[layer, name])

    def shape(self, layer: int, name: str) -> tuple[int, ...]:
        key, row = self._key[layer, name]
        return tuple(self.checkpoint.tensors[key])[0 if row is None else 1 :]

    def source(self, key: str) -> Source:
        shape = tuple(self.checkpoint.tensors[key])
        return Source(shape, self.checkpoint.dtype(key), partial(self.checkpoint.read, key))

    def layer_source(
        self, layer: int, name: str, rows: int | None = None, read: Read | None = None
    ) -> Source:
        """The tensor of a layer, or ``rows`` rows that ``read`` makes in its place."""
        shape = self.shape(layer, name)
        if rows is not None:
            shape = (rows, *shape[1:])
        dtype = self.checkpoint.dtype(self._key[layer, name][0])
        return Source(shape, dtype, read or partial(self.read, layer, name))


def _layer_tensor(
    layers: Layers, args: Namespace, role: Role, group: list[int], name: str
) -> Iterator[tuple[str, Source]]:
    """What becomes of one tensor of a layer; ``group`` has the layers to average over, if any."""
    kind = name.rpartition(".")[2]
    if role.plain:
        yield name, layers.layer_source(role.index, name)
    elif name.startswith(QKV) and kind in ("weight", "bias"):
        yield from _heads(layers, args, role, group, name)
    elif name.startswith(KEY_NORM):
        if not role.consumes:
            read = partial(_mean, layers, group or [role.index], name)
            yield name, layers.layer_source(role.index, name, read=read)
    else:
        source = layers.layer_source(role.index, name)
        yield name, source
        if role.own_norm and name.startswith(tuple(UNFUSED_NORMS)):
            yield name.replace(QKV, KV), source
        elif role.own_norm and name.startswith("input_layernorm."):
            yield name.replace("input_layernorm.", "self_attention.kv_norm."), source


def _heads(
    layers: Layers, args: Namespace, role: Role, group: list[int], name: str
) -> Iterator[tuple[str, Source]]:
    """``[K * (G + 2) * P, ...]``: queries of the layer; keys and values averaged over ``group``."""
    heads, size = args.num_attention_heads, args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else heads
    queries, keys = heads * size, 2 * groups * size
    if layers.shape(role.index, name)[0] != queries + keys:
        raise ConfigError(
            f"{layers.checkpoint.folder}: {name} of layer {role.index} is "
            f"{list(layers.shape(role.index, name))}; {queries} rows of queries and {keys} of keys "
            "and values were expected"
        )

    def blocks(tensor: Tensor) -> Tensor:
        return tensor.view(groups, heads // groups + 2, size, *tensor.shape[1:])

    def only_queries() -> Tensor:
        tensor = layers.read(role.index, name)
        return blocks(tensor)[:, :-2].reshape(queries, *tensor.shape[1:])

    def only_keys() -> Tensor:
        tensor = _mean(layers, group or [role.index], name)
        return blocks(tensor)[:, -2:].reshape(keys, *tensor.shape[1:])

    def both() -> Tensor:
        tensor = layers.read(role.index, name)
        pooled = _mean(layers, group or [role.index], name)
        return torch.cat((blocks(tensor)[:, :-2], blocks(pooled)[:, -2:]), 1).reshape(tensor.shape)

    if role.consumes or role.own_norm:
        yield name, layers.layer_source(role.index, name, queries, only_queries)
    else:
        yield name, layers.layer_source(role.index, name, queries + keys, both)
    if role.own_norm:
        yield name.replace(QKV, KV), layers.layer_source(role.index, name, keys, only_keys)


def _mean(layers: Layers, group: list[int], name: str) -> Tensor:
    """Over the layers of a group, in fp32."""
    tensors = [layers.read(layer, name) for layer in group]
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _numbered_state(key: str, own: list[Role]) -> Iterator[str]:
    """Where a module's extra state goes; other pickled objects are of the run, and stay behind."""
    match = _SHARD.fullmatch(key)
    if match is None or not match[1].endswith("._extra_state"):
        return
    layer = _LAYER.fullmatch(match[1])
    if layer is None:
        yield key
        return
    name, offsets, sizes = layer[2], match[2].split("."), match[3].split(".")
    if layer[1] is not None:
        index = int(layer[1])
    else:
        index, offsets, sizes = int(offsets[0]), offsets[1:] or ["0"], sizes[1:] or ["1"]
    shard = f"shard_{'.'.join(offsets)}_{'.'.join(sizes)}"
    role = own[index]
    if not (role.consumes and name.startswith(KEY_NORM)):
        yield f"decoder.layers.{index}.{name}/{shard}"
    if role.own_norm and name.startswith(QKV):
        yield f"decoder.layers.{index}.{name.replace(QKV, KV)}/{shard}"
