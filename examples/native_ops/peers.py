"""The linear layers that are compared: ours, and those of torch itself.

Each is prepared from a weight, as a server would once, and is then a function of the inputs
``[M, K]`` in bf16. What a peer wants in another dtype is converted before it is timed; what it
quantizes of the inputs itself, as ours do, is part of its time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from arms import Unavailable, native
from names import BF16, INT4_PACK, INT8, LINEAR
from torch import Tensor
from torch.nn import functional as F
from weights import GROUP, Weight, remembering

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    scheme: str
    bits: float
    """Of a weight in memory, with its scales."""
    prepare: Callable[[Weight, int], Forward]
    """Given the number of threads too; raises Unavailable."""


def ours(groups: bool, bits: int) -> Callable[[Weight, int], Forward]:
    def prepare(weight: Weight, threads: int) -> Forward:
        pack, prepack, linear = native(
            "int4.pack_int4", "prepacked.prepack_w4", "prepacked.w4a4_linear_prepacked"
        )
        codes, scale = weight.int4(groups)
        prepacked = prepack(pack(codes), scale)
        return lambda x: linear(x, prepacked, weight.n, input_bits=bits)

    return prepare


def bf16(weight: Weight, threads: int) -> Forward:
    matrix = weight.bf16.clone()
    return lambda x: F.linear(x, matrix)


def bf16_prepacked(weight: Weight, threads: int) -> Forward:
    """oneDNN's own order of the weight, chosen for each number of rows, as torch.compile does."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("oneDNN has no bf16 here")
    packed: dict[int, Tensor] = {}

    def forward(x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows not in packed:
            packed.clear()
            packed[rows] = torch.ops.mkldnn._reorder_linear_weight(weight.bf16, rows)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed[rows], None, "none", [], "")
        return out

    return forward


def dynamic_int8(engine: str) -> Callable[[Weight, int], Forward]:
    """W8A8 of torch: ``torch.ao.nn.quantized.dynamic.Linear``, fp32 in and out.

    Its engine ``x86`` is one of the other two, as the processor has it.
    """

    def prepare(weight: Weight, threads: int) -> Forward:
        if engine not in torch.backends.quantized.supported_engines:
            raise Unavailable("this torch was built without it")
        from torch.ao.nn.quantized.dynamic import Linear

        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scale = weight.fp32.abs().amax(1).double() / 127
            zeros = torch.zeros(weight.n, dtype=torch.long)
            codes = torch.quantize_per_channel(weight.fp32, scale, zeros, 0, torch.qint8)
            linear = Linear(weight.k, weight.n, bias_=False)
            linear.set_weight_bias(codes, None)
        wide = remembering(lambda x: x.float())
        return lambda x: linear(wide(x))

    return prepare


def int4_pack(weight: Weight, threads: int) -> Forward:
    """W4A16 of torch, bf16 in and out."""
    codes, scale = weight.groups
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 2)
    columns = scale.T
    pairs = torch.stack((columns, torch.zeros_like(columns)), -1).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pairs)


IN_TORCH = (
    Peer(BF16, "bf16", 16, bf16),
    Peer("bf16 prepacked", "bf16", 16, bf16_prepacked),
    *(Peer(name, "W8A8", 8, dynamic_int8(name.rpartition(" ")[2])) for name in INT8),
    Peer(INT4_PACK, "W4A16 g128", 4 + 32 / GROUP, int4_pack),
)
OF_OURS = tuple(
    Peer(name, name, 4 + 64 / GROUP if groups else 4, ours(groups, bits))
    for name, (groups, bits) in LINEAR.items()
)
