"""A rank that dies, or falls asleep, in the middle of a ladder's step.

    ladder_fault.py dies|sleeps forward|backward plain|sp

Rank 1 fails when the MLP of layer 2 starts, in the forward or in the backward. Rank 0 prints the
error it gets instead of a hang, and ends.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch.distributed as dist

from tests.megatron.ladder_cases import SP, backward, build, inputs, start

TIMEOUT = 4.0
"""Seconds that a rank waits for the other."""


def main(how: str, where: str, layout: str) -> None:
    start(TIMEOUT / 60)
    model = build("all", **(SP if layout == "sp" else {}))

    def fail(*_: Any) -> None:
        if dist.get_rank() == 1:
            if how == "sleeps":
                time.sleep(3 * TIMEOUT)
            os._exit(0)

    mlp = model.decoder.layers[2].mlp
    if where == "forward":
        mlp.register_forward_pre_hook(fail)
    else:
        mlp.linear_fc2.weight.register_hook(fail)
    try:
        backward(model(*inputs()))
    except RuntimeError as error:
        print(f"error: {error}", flush=True)
        os._exit(3)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
