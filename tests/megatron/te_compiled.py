"""Stands in for TransformerEngine's compiled half, ``transformer_engine_torch``, without a GPU.

TransformerEngine's Python half is the real one. Its compiled half exists for GPU machines only;
here it is a placeholder but for what dense layers without FP8 call: matrix products and norms,
which torch computes on the CPU. Importing this file installs it, ahead of Megatron.
"""

from __future__ import annotations

import sys
import warnings
from enum import IntEnum
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from megatron_plugins import cpu

warnings.filterwarnings("ignore")
cpu.install()


class DType(IntEnum):
    kByte, kInt32, kFloat32, kFloat16, kBFloat16 = 0, 2, 4, 5, 6
    kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = 7, 8, 10


class FusedAttentionBackend(IntEnum):
    NVTE_No_Backend, NVTE_F16_arbitrary_seqlen, NVTE_FP8 = -1, 1, 2


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: None,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    comm_overlap: None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """``op(B) op(A)``, row-major, with the bias added, or in a backward its gradient."""
    assert quantizer is comm_overlap is None
    assert not gelu
    assert not accumulate
    left, right = B.flatten(0, -2), A.flatten(0, -2)
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    bias_grad = left.sum(0) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias
    if not transb:
        product = product.view(*B.shape[:-1], -1)
    return (product if out is None else out.copy_(product)), bias_grad, None, None


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, weight.shape, weight, bias, eps)


def layernorm_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need = [True, True, True]
    backward = torch.ops.aten.native_layer_norm_backward
    found: tuple[Tensor, Tensor, Tensor] = backward(
        dy, x, weight.shape, mean, rstd, weight, torch.zeros_like(weight), need
    )
    return found


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, *_: Any) -> tuple[Tensor, None, Tensor]:
    rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * rstd * weight.float()).to(x.dtype), None, rstd


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    normed, sent = x.float() * rstd, dy.float() * weight.float()
    dx = rstd * (sent - normed * (sent * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


NUMERIC = (generic_gemm, layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd)

compiled = MagicMock(name="transformer_engine_torch")
compiled.__spec__ = None
compiled.DType, compiled.NVTE_Fused_Attn_Backend = DType, FusedAttentionBackend
compiled.__all__ = [function.__name__ for function in NUMERIC]
for function in NUMERIC:
    setattr(compiled, function.__name__, function)
sys.modules["transformer_engine_torch"] = compiled
import transformer_engine.common

transformer_engine.common.load_framework_extension = lambda framework: None
import transformer_engine.pytorch
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


def _prepare_forward(self: Any, inp: Tensor, num_gemms: int = 1, **_: Any) -> Tensor:
    """As upstream's without FP8, but for its check that the input is on a GPU."""
    assert self.tp_size == 1 or self.tp_group_initialized
    self.allow_different_data_and_param_types = False
    self.set_activation_dtype(inp)
    self.init_fp8_metadata(num_gemms=num_gemms)
    return inp.contiguous()


TransformerEngineBaseModule.prepare_forward = _prepare_forward
