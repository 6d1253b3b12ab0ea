"""Kernels in Triton, which GPUs run where the CUDA library of ``csrc/`` is not built.

Triton comes with torch's builds for GPUs. It is imported by the first call that reaches a GPU.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ... import native


def register() -> bool:
    """Register the kernels for GPUs: where the CUDA library is neither active nor turned off, and
    Triton is there."""
    state = native.load()["cuda"]
    if state.startswith(("active", "off")) or importlib.util.find_spec("triton") is None:
        return False
    torch.library.impl("torch_plugins::w4a4_linear", "CUDA", _w4a4_linear)
    return True


def _w4a4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    input_bits: int,
) -> Tensor:
    from .int4 import w4a4_linear

    return w4a4_linear(x, weight, weight_scale, input_scale, input_zero_point, bias, input_bits)
