"""Time of an all-reduce: latency of its steps plus bytes over bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .hardware import NCCL_START, Link


@dataclass(frozen=True)
class Fabric:
    """How the ranks of a tensor-parallel group are joined."""

    ranks: int
    nodes: int
    inside: Link
    """Within a node."""
    between: Link
    """Between nodes: one such adapter a rank."""
    start: float = NCCL_START
    """Seconds before the first step."""


def all_reduce(bytes: float, fabric: Fabric) -> float:
    """Seconds of an all-reduce of ``bytes`` on each of ``T`` ranks, ``T / N`` a node.

        ring   start + 2 (T - N) inside + 2 (N - 1) between + bytes 2 (T - 1) / T / bandwidth
        tree   start + 2 (T / N - 1) inside + 2 ceil(log2 N) between + bytes 2 / bandwidth

    whichever is less (steps as NCCL counts them). Channels pass through every adapter of a node, so
    ``bandwidth`` is the least of a link inside and all of a node's adapters together.
    """
    ranks, nodes = fabric.ranks, fabric.nodes
    if ranks == 1:
        return 0.0
    inside, between, local = fabric.inside, fabric.between, ranks // nodes
    bandwidth = inside.bandwidth if local > 1 else math.inf
    if nodes > 1:
        bandwidth = min(bandwidth, between.bandwidth * local)
    ring = 2 * (ranks - nodes) * inside.latency + 2 * (nodes - 1) * between.latency
    ring += bytes * 2 * (ranks - 1) / ranks / bandwidth
    tree = 2 * (local - 1) * inside.tree_latency
    tree += 2 * math.ceil(math.log2(nodes)) * between.tree_latency + bytes * 2 / bandwidth
    return fabric.start + min(ring, tree)
