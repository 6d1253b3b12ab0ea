"""Ladder Residual: every module reads the residual stream one module early.

Modules ``h_1 .. h_2L`` alternate attention and MLP; each includes its pre-norm and its residual
multiplier. With ``x_0`` the embedding and ``x_{-1} := x_0``,

    standard   x_{i+1} = x_i + h_{i+1}(x_i)
    ladder     x_{i+1} = x_i + h_{i+1}(x_{i-1})

so the tensor-parallel reduction of ``h_i`` can run while ``h_{i+1}`` computes. Attention 1 and
MLP 1 both read the embedding. The stream itself stays the plain sum of all modules; the final norm
reads it.

Two tensors are the whole state between layers, and so what crosses a pipeline or checkpoint
boundary: the stream after the layer's MLP and the stream after its attention. A partial ladder
needs no other: the first ladder layer's attention reads the stream after the previous layer's
attention, whether that layer is a ladder layer or not.

Paper: arXiv 2501.06589, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Streams(NamedTuple):
    """The residual stream at two depths, both ``[batch, sequence, hidden]`` or any equal shape."""

    hidden_states: Tensor
    """After the MLP of the last layer: the sum of every module so far."""
    attention_states: Tensor
    """After the attention of the last layer: the same sum without the last MLP."""


def initial_streams(embedding: Tensor) -> Streams:
    """State before layer 0."""
    return Streams(embedding, embedding)


def apply_layer(
    streams: Streams,
    attention: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
    ladder: bool,
) -> Streams:
    """One layer, ladder or standard.

    Args:
        streams: state left by the previous layer, or :func:`initial_streams`.
        attention: pre-norm, attention and residual multiplier; its result is added to the stream.
        mlp: pre-norm, MLP and residual multiplier.
        ladder: whether this layer reads one module early.
    """
    after_mlp, after_attention = streams
    attention_states = after_mlp + attention(after_attention if ladder else after_mlp)
    hidden_states = attention_states + mlp(after_mlp if ladder else attention_states)
    return Streams(hidden_states, attention_states)


if __name__ == "__main__":
    from torch_plugins.ladder_estimate.cli import main

    main()
