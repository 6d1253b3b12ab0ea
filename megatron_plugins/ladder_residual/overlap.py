"""What a ladder hides beside the reductions of its modules' outputs.

*Backward.* A column-parallel linear reduces its input's gradient. In the ladder,

    x_{i+1} = x_i + h_{i+1}(x_{i-1})

the gradient that h_{i+1} sends to x_{i-1} is not needed by the backward of h_i, which needs that of
x_i only. So its reduction is launched after dgrad, and waited for after the backward of h_i::

    backward of h_{i+1}:  dgrad, launch, wgrad
    backward of h_i:      all of it
    then:                 wait, norm, add to the gradient of x_{i-1}

Of what is ready, autograd runs what was created last. The wait, which is created within h_{i+1},
would run at once: it is given the number of the place where it belongs.

*Sequence parallel.* Here a module begins with an all-gather of its input and ends with a
reduce-scatter, and between the two lie only an add and a norm. The chain of all four fits under one
module, if it begins before that module has ended. Once the column-parallel linear of h_i is done::

    wait for the reduce-scatter of h_{i-1}, add, norm of h_{i+1}, launch its all-gather

under the rest of h_i; h_i began under that reduce-scatter. In the backward, where an all-gather
leads to a module and a reduce-scatter leaves it, the same place in h_i serves for the mirrored
chain.

How a linear's own code leaves its collectives in flight: ``linears.py`` for Megatron's linears,
``te_linears.py`` for TransformerEngine's.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_plugins.ladder_residual.linears import Places, gather, is_local, local_class
from megatron_plugins.ladder_residual.te_linears import is_te, norm_of, te_class
from megatron_plugins.reduction import launches_in_backward, renumber


def numbers(layer: Any) -> dict[str, int]:
    """Numbers in the model of a layer's modules: attention 2 l and MLP 2 l + 1 of layer l; or l,
    where each layer is one module."""
    from megatron.core.transformer.identity_op import IdentityOp

    modules = {"attention": layer.self_attention, "mlp": layer.mlp}
    found = [name for name, module in modules.items() if not isinstance(module, IdentityOp)]
    return {name: len(found) * layer.ladder.index + at for at, name in enumerate(found)}


def prepare(layer: Any) -> dict[str, Any]:
    """Have the column-parallel linears of a ladder layer, or of the one before, overlap.

    Returns:
        The linear in which a module ("attention", "mlp") begins with an all-gather.
    """
    entrances: dict[str, Any] = {}
    config, place = layer.config, layer.ladder
    if config.tensor_model_parallel_size == 1:
        return entrances
    *others, _ = layer.numbers
    for name, number in layer.numbers.items():
        if not place.ladder and name in others:
            continue
        module = layer.self_attention if name == "attention" else layer.mlp
        moe = name == "mlp" and layer.is_moe_layer  # its dispatcher communicates
        found: list[Any] = [] if moe else list(module.modules())
        linears = [x for x in found if is_local(x) or is_te(x, config)]
        for linear in linears:
            linear.__class__ = local_class(linear) if is_local(linear) else te_class(linear)
            linear.ladder_places, linear.ladder_module = layer.stage.places, number
            linear.ladder_what = f"layer {place.index}, {name}"
            linear.ladder_gathering = linear.ladder_then = None
        if not config.sequence_parallel:
            module.register_forward_pre_hook(partial(_note_start, layer.stage.places, number))
        elif place.ladder and len(linears) == 1:
            linears[0].ladder_then = partial(_halfway, layer, name)
            entrances[name] = linears[0]
    return entrances


def _note_start(places: Places, number: int, *_: Any) -> None:
    """After everything in this module, in the backward: its linear's own wait takes this number,
    and leaves it free where it has another."""
    places[number] = torch.autograd._get_sequence_nr()


def _halfway(layer: Any, name: str) -> None:
    """Under the rest of a module, begin the next one: its input is there."""
    layer.stage.places[layer.numbers[name]] = torch.autograd._get_sequence_nr()
    found = _next(layer, name)
    if found is not None:
        norm, linear = found
        linear.ladder_gathering = gather(linear, norm.begin(layer.complete_early(name)))


def _next(layer: Any, name: str) -> tuple[Any, Any] | None:
    """Norm and linear of the module after this one, where they can begin before it has ended: not
    in another chunk of recomputation."""
    after, module = layer, "mlp"
    if name == list(layer.numbers)[-1]:
        apart = layer.training and layer.config.recompute_granularity == "full"
        within = name == "mlp" and layer.recompute_mlp
        if apart or within or not layer.following:
            return None
        (after,) = layer.following
        module = next(iter(after.numbers))
    norm = "input_layernorm" if module == "attention" else "pre_mlp_layernorm"
    linear = after.entrances.get(module)
    quantizes = getattr(linear, "input_quantizer", None) is not None
    if linear is None or quantizes or getattr(after, f"recompute_{norm}"):
        return None
    found = norm_of(linear) or getattr(after, norm)
    if not hasattr(found, "begin"):
        own: Any = type(found)
        found.__class__ = beginning_class(own)
        found.begun = None
    return found, linear


@cache
def beginning_class(base: Any) -> type:
    """A subclass of a norm that can be computed before it is called."""

    class Beginning(base):
        def begin(self, x: Tensor) -> Tensor:
            self.begun = None
            self.begun = x, self(x)
            return self.begun[1]

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            begun, self.begun = self.begun, None
            if begun is not None and begun[0] is x:
                return begun[1]
            return super().forward(x, *args, **kwargs)

    Beginning.__name__ = Beginning.__qualname__ = base.__name__
    return Beginning


def launch_early(reduced: Tensor) -> None:
    """In the backward, gather the gradient of a module's output as soon as it is there."""
    if launches_in_backward(reduced):
        renumber(reduced, torch.autograd._get_sequence_nr())
