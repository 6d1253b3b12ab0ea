"""Models with a residual multiplier against the recurrence written out, as in ladder_cases.py."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from tests.megatron import ladder_cases
from tests.megatron.ladder_table import LLAMA
from tests.megatron.power_mup_table import AGAINST_RECURRENCE, MULTIPLIER


def against_recurrence(ladder: str, options: dict[str, Any]) -> dict[str, Any]:
    result = ladder_cases.against_recurrence(ladder, options, MULTIPLIER)
    result["from unscaled"] = result.pop("from standard", None)
    return result


def main(output: str) -> None:
    ladder_cases.start()
    torch.manual_seed(0)
    cases = {
        name: functools.partial(against_recurrence, *case)
        for name, case in AGAINST_RECURRENCE.items()
    }
    inference = functools.partial(ladder_cases.static_inference, multiplier=MULTIPLIER)
    ladder_cases.write(
        output,
        {**cases, "inference": inference, "inference-llama": lambda: inference(**LLAMA)},
    )


if __name__ == "__main__":
    main(sys.argv[1])
