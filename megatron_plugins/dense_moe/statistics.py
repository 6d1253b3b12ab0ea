"""What Megatron's training log says of the routers.

- ``mi mlp``: mutual information of tokens and experts, the negative of the loss, 0 to log N nats;
- ``entropy mlp``: of the experts given a token, log N where a router knows nothing, 0 where sure;
- ``active mlp``: share of (token, expert) pairs above ``--dsmoe-threshold``.
"""

from __future__ import annotations

from megatron_plugins.metrics import Meter
from torch_plugins.dense_moe import Utilization

METER = Meter(("mlp", "attention"), ("mi", "entropy", "active"))


def count(kind: str, found: Utilization) -> None:
    """Count one router's micro-batch."""
    METER.add(kind, (found.mutual_information, found.conditional_entropy, found.active_N.mean()))
