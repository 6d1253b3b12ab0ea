"""A few chosen experts of many, each token its own: inference of DS-MoE and of other mixtures.

With N experts of width F, and for each token t the experts that it keeps,

    h[t, i] = act(gate_i x[t]) * up_i x[t]            or act(up_i x[t]) without gates
    y[t]    = sum over kept i of S[t, i] down_i h[t, i]

in four forms: :func:`sparse_moe` by weights in fp32, bf16 or fp16; :func:`w4a4_sparse_moe` by
four-bit ones in plain storage, whose inputs x[t] and h[t, i] are quantized each with a scale of its
own as :mod:`torch_plugins.ops.int4` says; and :func:`w4a4_sparse_moe_prepacked` by those in the
order in which CPUs read them. A token that keeps no expert gets zeros. Sums over experts are in
fp32, in their order; none of these has a gradient. On a CPU, plain weights of which an expert has
many tokens are multiplied by torch's own matrix products, between which the rest is native.

Shapes: T tokens, D hidden size, N experts, F width of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..native import active
from .inference import define, refuse_gradient
from .int4 import w4a4_linear_reference
from .prepacked import prepack_w4, unprepack_w4

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

MODULES = {"SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}
"""Classes of transformers that compute the same."""


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Which of ``ACTIVATIONS`` it is, a function of torch or a module; None: none that is known."""
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    modules = {F.silu: "silu", nn.SiLU: "silu", F.gelu: "gelu", F.relu: "relu", nn.ReLU: "relu"}
    for kind in (activation, type(activation)):
        if kind in modules:
            return modules[kind]
    return MODULES.get(type(activation).__name__)


def runs_in_native_code(x: Tensor, *weights: Tensor) -> bool:
    """Whether :func:`sparse_moe` of these is native code that may replace torch's operators."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        return False
    alike = all(weight.dtype == x.dtype for weight in weights)
    wanted = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return wanted and alike and active("cpu") and not torch.is_autocast_enabled("cpu")


def sparse_moe_reference(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """:func:`sparse_moe` by torch's own operators."""
    act = ACTIVATIONS[activation]

    def expert(index: int, rows: Tensor) -> Tensor:
        inner = F.linear(rows, up[index])
        inner = act(inner) if gate is None else act(F.linear(rows, gate[index])) * inner
        return F.linear(inner, down[index]).float()

    return _sum(x, scores, kept, expert, down.shape[1])


def _sum(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    expert: Callable[[int, Tensor], Tensor],
    features: int,
) -> Tensor:
    """Every expert's tokens through it, added up."""
    out = x.new_zeros((x.shape[0], features), dtype=torch.float32)
    for index in range(kept.shape[1]):
        tokens = kept[:, index].nonzero().squeeze(-1)
        if len(tokens):
            weights = scores[tokens, index].float().unsqueeze(-1)
            out.index_add_(0, tokens, expert(index, x[tokens]) * weights)
    return out.to(x.dtype)


def _sparse_moe_fake(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    return x.new_empty((x.shape[0], down.shape[1]))


_sparse_moe = define("sparse_moe", sparse_moe_reference, _sparse_moe_fake)


def sparse_moe(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
) -> Tensor:
    """``y`` above, ``[T, D]`` in the dtype of ``x``.

    Args:
        x: ``[T, D]``.
        scores: ``S`` ``[T, N]``, fp32 or the dtype of ``x``.
        kept: bool ``[T, N]``.
        gate: ``[N, F, D]``, or None.
        up: ``[N, F, D]``.
        down: ``[N, D, F]``; a view of ``[D, N F]`` is as good.
        activation: silu, gelu, gelu_tanh or relu.

    Raises:
        RuntimeError: ``x`` wants a gradient.
    """
    refuse_gradient("sparse_moe", x)
    out: Tensor = _sparse_moe(x, scores, kept, gate, up, down, activation)
    return out


def w4a4_sparse_moe_reference(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gated: bool,
    activation: str,
    input_bits: int,
) -> Tensor:
    """:func:`w4a4_sparse_moe` by torch's own operators."""
    act = ACTIVATIONS[activation]

    def linear(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return w4a4_linear_reference(rows, weight, scale, None, None, None, input_bits)

    def expert(index: int, rows: Tensor) -> Tensor:
        inner = linear(rows.float(), gate_up[index], gate_up_scale[index])
        if gated:
            first, second = inner.chunk(2, -1)
            inner = act(first) * second
        else:
            inner = act(inner)
        return linear(inner, down[index], down_scale[index])

    return _sum(x, scores, kept, expert, down.shape[1])


def _w4a4_sparse_moe_fake(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gated: bool,
    activation: str,
    input_bits: int,
) -> Tensor:
    return x.new_empty((x.shape[0], down.shape[1]))


_w4a4_sparse_moe = define("w4a4_sparse_moe", w4a4_sparse_moe_reference, _w4a4_sparse_moe_fake)


def w4a4_sparse_moe(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gated: bool = True,
    activation: str = "silu",
    input_bits: int = 4,
) -> Tensor:
    """:func:`sparse_moe` by four-bit weights, inputs quantized to ``input_bits`` (2 to 8).

    Args:
        gate_up: bytes ``[N, 2 F, ceil(D / 2)]``, rows of the gate first; ``[N, F, ceil(D / 2)]``
            where not ``gated``.
        gate_up_scale: ``[N, 2 F, G]`` or ``[N, F, G]``; G divides D.
        down: bytes ``[N, D, ceil(F / 2)]``.
        down_scale: ``[N, D, G]``; G divides F.
    """
    refuse_gradient("w4a4_sparse_moe", x)
    out: Tensor = _w4a4_sparse_moe(
        x,
        scores,
        kept,
        gate_up,
        gate_up_scale,
        down,
        down_scale,
        gated,
        activation,
        input_bits,
    )
    return out


def prepack_experts(weight: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """Every expert's weight by itself, ``[N, bytes]``; see :func:`~.prepacked.prepack_w4`."""
    return torch.stack(
        [prepack_w4(w, s, in_features) for w, s in zip(weight, weight_scale, strict=True)]
    )


def w4a4_sparse_moe_prepacked_reference(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate_up: Tensor,
    down: Tensor,
    width: int,
    gated: bool,
    activation: str,
    input_bits: int,
) -> Tensor:
    """:func:`w4a4_sparse_moe_prepacked` by torch's own operators."""
    into, into_scale = _unprepacked(gate_up)
    out_of, out_scale = _unprepacked(down)
    return w4a4_sparse_moe_reference(
        x, scores, kept, into, into_scale, out_of, out_scale, gated, activation, input_bits
    )


def _unprepacked(experts: Tensor) -> tuple[Tensor, Tensor]:
    parts = [unprepack_w4(expert) for expert in experts]
    return torch.stack([weight for weight, _, _ in parts]), torch.stack([s for _, s, _ in parts])


def _w4a4_sparse_moe_prepacked_fake(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate_up: Tensor,
    down: Tensor,
    width: int,
    gated: bool,
    activation: str,
    input_bits: int,
) -> Tensor:
    return torch.empty_like(x)


_w4a4_sparse_moe_prepacked = define(
    "w4a4_sparse_moe_prepacked",
    w4a4_sparse_moe_prepacked_reference,
    _w4a4_sparse_moe_prepacked_fake,
)


def w4a4_sparse_moe_prepacked(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    gate_up: Tensor,
    down: Tensor,
    width: int,
    gated: bool = True,
    activation: str = "silu",
    input_bits: int = 4,
) -> Tensor:
    """:func:`w4a4_sparse_moe` by weights of :func:`prepack_experts`.

    Args:
        gate_up, down: ``[N, bytes]``.
        width: F.
    """
    refuse_gradient("w4a4_sparse_moe_prepacked", x)
    out: Tensor = _w4a4_sparse_moe_prepacked(
        x, scores, kept, gate_up, down, width, gated, activation, input_bits
    )
    return out
