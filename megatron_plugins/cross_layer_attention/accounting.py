"""The training log's floating-point operations and theoretical memory."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_plugins.arguments import features_of
from megatron_plugins.cross_layer_attention.groups import roles
from megatron_plugins.hybrid import pattern
from torch_plugins.config import CrossLayerAttention


def with_mean_groups(
    original: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any
) -> Any:
    """Wrap of upstream's two counts, which are linear in the number of key-value heads per layer:
    they are given its mean over all layers with attention, where a consumer has none."""
    feature: CrossLayerAttention = features_of(args)[CrossLayerAttention.key()]
    own = roles(feature, args.num_layers, pattern(args))
    producers = sum(not role.consumes for role in own)
    heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    args = copy.copy(args)
    args.group_query_attention = True
    args.num_query_groups = heads * producers / len(own)
    return original(args, *rest, **kwargs)
