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

    wait_before: Callable[[], None] = staticmethod(lambda: None)
    """Waits for the MLP output of the layer before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            # Gradient checkpointing saves the layer's inputs before the forward runs, and hooks
            # that offload what is saved copy them.
            self.wait_before()
        return super().__call__(*args, **kwargs)

    def _add(self, stream: Tensor, out: Tensor, module: Any = None) -> Tensor:
        """As the decoder's layer, which adds an output when the next module has run; waits."""
        if module is None:
            self.wait_before()
        else:
            last = module.o_proj if module is self.self_attn else module.down_proj
            if isinstance(last, AsyncLinearAllreduce):
                last.wait()
        return super()._add(stream, out, module)

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
