"""Linear layers of torchao and ONNX Runtime, where they are installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from arms import Unavailable
from names import ORT, TORCHAO_INT4, TORCHAO_INT8
from peers import Forward, Peer
from torch import Tensor
from torch.nn import functional as F
from weights import GROUP, Weight, remembering

SHAPES = 64
"""More than there are: beyond so many, torch would run the function uncompiled."""


def torchao(bits: int) -> Callable[[Weight, int], Forward]:
    """Dynamic int8 inputs, through ``torch.compile``.

    Its x86 kernel for int4 weights (``da8w4_linear_cpu``) is in no wheel on PyPI, from 0.13 to
    0.18: it is used where torchao was built with it, else the weight is dequantized in each call.
    """

    def prepare(weight: Weight, threads: int) -> Forward:
        try:
            import torchao.quantization as ao
        except ImportError as missing:
            raise Unavailable(str(missing)) from None
        linear = torch.nn.Linear(weight.k, weight.n, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            linear.weight.copy_(weight.bf16)
        config = ao.Int8DynamicActivationInt8WeightConfig()
        if bits == 4 and has_kernel():
            from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig

            config = Int8DynamicActivationInt4WeightConfig(group_size=GROUP)
        elif bits == 4:
            config = ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=ao.PerGroup(GROUP)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ao.quantize_(linear, config)
        quantized, product = linear.weight, compiled()
        return lambda x: product(x, quantized)

    return prepare


def has_kernel() -> bool:
    """Whether this torchao was built with its kernel for int4 weights on x86."""
    return "CPU" in torch._C._dispatch_dump("torchao::da8w4_linear_cpu")


@cache
def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """One function for all weights, each shape compiled by itself."""
    torch._dynamo.config.recompile_limit = SHAPES
    return torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False)


def onnxruntime(weight: Weight, threads: int) -> Forward:
    """MatMulNBits with int4 weights in blocks of 128 and int8 products (accuracy level 4), fp32."""
    try:
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as missing:
        raise Unavailable(str(missing)) from None
    codes, scale = weight.groups
    halves = (codes + 8).to(torch.uint8).unflatten(-1, (-1, GROUP // 2, 2))
    packed = halves[..., 0] | halves[..., 1] << 4  # [N, K / 128, 64]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        K=weight.k,
        N=weight.n,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    stored = {"packed": packed, "scales": scale.flatten()}
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", weight.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", weight.n])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would wait for more work while the next arm is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    array = remembering(lambda x: {"x": x.float().numpy()})
    return lambda x: torch.from_numpy(session.run(None, array(x))[0])


INSTALLED = (
    Peer(TORCHAO_INT4, "W4A8 g128", 4 + 32 / GROUP, torchao(4)),
    Peer(TORCHAO_INT8, "W8A8", 8, torchao(8)),
    Peer(ORT, "W4A8 g128", 4 + 32 / GROUP, onnxruntime),
)
