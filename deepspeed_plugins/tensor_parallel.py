"""Ladder Residual under DeepSpeed's AutoTP: all-reduces that overlap the next module.

AutoTP shards the decoder by the decoder's own plan (``base_model_tp_plan``), and a row-parallel
projection then waits for its all-reduce. In a ladder nothing reads that sum before the next module
has run, so the projection starts the all-reduce and returns, and its output is *pending* until the
add (arXiv 2501.06589, section 3)::

    attention  of layer l:  start its all-reduce;  wait for MLP l - 1, add it
    MLP        of layer l:  start its all-reduce;  wait for attention l, add it

A pending MLP output crosses to the next layer beside the residual stream, which is then the sum
without it. The layer before the first ladder layer hands its MLP output over too; the last ladder
layer has no next module, and its MLP reduces as AutoTP does. The number of all-reduces and their
bytes stay. The backward is AutoTP's: its reductions belong to the column-parallel projections.

Shapes: B batch, S sequence, I a rank's share of the inner size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.module_inject.layers import LinearAllreduce
from torch import Tensor

from deepspeed_plugins.features import SECTION
from torch_plugins.config import ConfigError
from torch_plugins.hf.modeling_plugin_decoder import PluginDecoderLayer

HOST = LinearAllreduce.__module__.split(".")[0]


class _Start(torch.autograd.Function):
    """Forward: start the all-reduce of ``partial_sums + bias``, in place, the bias on one rank
    only. Backward: the identity, and for the bias the sum over tokens, alike on every rank."""

    @staticmethod
    def forward(ctx: Any, partial_sums: Tensor, bias: Tensor | None, linear: Any) -> Tensor:
        ctx.linear = linear
        if bias is not None and linear.tp_index == 0:
            partial_sums = partial_sums + bias
        buffer = partial_sums.detach().contiguous()
        # An alias: gloo writes in a thread of its own, where autograd must not look.
        linear.work = dist.all_reduce(buffer.detach(), group=linear.mp_group, async_op=True)
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        ctx.linear.wait()  # a recomputed module starts a reduction whose sum nobody reads
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad, bias, None


class AsyncLinearAllreduce(LinearAllreduce):
    """AutoTP's row-parallel linear, its all-reduce not waited for.

    ``[B, S, I] -> [B, S, D]``; :meth:`wait` must be called before the output is read.
    """

    work: Any = None
    """The all-reduce in flight."""

    def forward(self, input: Tensor) -> Tensor:
        if self.defer_collectives_to_compiler:
            raise ConfigError(
                f'{SECTION}.ladder_residual: "autotp" of the JSON\'s compile.passes takes the '
                "reductions out of the layers that overlap them; drop one of the two"
            )
        self.wait()
        partial_sums = torch.matmul(input, self.weight.transpose(-1, -2))
        output: Tensor = _Start.apply(partial_sums, self.bias, self)
        return output

    def wait(self) -> None:
        """Return once the last output is there; may be called any number of times."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()


class OverlappedLayer(PluginDecoderLayer):
    """A layer of the decoder whose outputs are pending while the next module runs."""

    hands_over = False
    """The next layer is a ladder layer, and adds this one's MLP output."""
    wait_before: Callable[[], None] = staticmethod(lambda: None)
    """Waits for the MLP output of the layer before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            # Gradient checkpointing saves the layer's inputs before the forward runs, and hooks
            # that offload what is saved copy them.
            self.wait_before()
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_states: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        pending: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the decoder's layer, with one more tensor between layers.

        Args:
            pending: MLP output of the layer before, ``[B, S, D]``. ``hidden_states`` is then the
                stream without it, the stream that a ladder's attention reads.
            hidden_states, attention_states, key, value: as in the decoder's layer.
        """
        o_proj: Any = self.self_attn.o_proj
        down_proj: Any = self.mlp.down_proj
        stale = hidden_states
        if self.ladder and pending is None and attention_states is not None:
            stale = attention_states
        normed = self.input_layernorm(stale)
        attended, _, key, value = self.self_attn(normed, stale, key, value, **kwargs)
        if pending is not None:
            self.wait_before()
            hidden_states = hidden_states + pending * self.residual_multiplier
        if self.ladder:
            out = self.mlp(self.post_attention_layernorm(hidden_states))
            o_proj.wait()
            attention_states = hidden_states + attended * self.residual_multiplier
        else:
            attention_states = hidden_states + attended * self.residual_multiplier
            out = self.mlp(self.post_attention_layernorm(attention_states))
        shared = (key, value) if self.shares_kv else (None, None)
        if self.hands_over and not self._watched():
            return attention_states, None, *shared, out
        if self.hands_over:
            down_proj.wait()
        return attention_states + out * self.residual_multiplier, attention_states, *shared

    def _watched(self) -> bool:
        """Whether a hook may read the hidden states that the layer returns; ZeRO's do not."""
        hooks = self._forward_hooks.values()
        return any(getattr(hook, "__module__", "").split(".")[0] != HOST for hook in hooks)


def overlap(model: Any) -> None:
    """Let the ladder layers of a decoder that AutoTP has sharded overlap their all-reduces.

    Only classes change: parameters and hooks stay, and a model that does it already stays too.

    Raises:
        ConfigError: AutoTP has left a projection whole, or sharded it in another way.
    """
    layers = list(model.model.layers)
    for index, layer in enumerate(layers):
        following = layers[index + 1] if index + 1 < len(layers) else None
        hands_over = following is not None and following.ladder
        if not layer.ladder and not hands_over:
            continue
        layer.__class__ = OverlappedLayer
        layer.hands_over = hands_over
        if layer.ladder:
            _start_only(layer.self_attn.o_proj, f"model.layers.{index}.self_attn.o_proj")
        if following is not None and hands_over:
            down_proj = layer.mlp.down_proj
            _start_only(down_proj, f"model.layers.{index}.mlp.down_proj")
            following.wait_before = down_proj.wait


def _start_only(linear: Any, name: str) -> None:
    if type(linear) not in (LinearAllreduce, AsyncLinearAllreduce):
        raise ConfigError(
            f"{SECTION}.ladder_residual: AutoTP has made {name} a {type(linear).__qualname__}, "
            "which reduces in a way of its own; drop tensor_parallel and use ZeRO"
        )
    linear.__class__ = AsyncLinearAllreduce
