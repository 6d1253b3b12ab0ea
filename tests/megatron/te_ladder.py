"""TransformerEngine's layers in two processes: ladders run, and te_layers.py's built.

The ladders are those of ladder_cases.py with layers of TransformerEngine's spec, whose autograd
functions are the real ones; the attention between the linears is Megatron's. Rank 0 writes one JSON
line a case.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.megatron import te_compiled  # noqa: F401

# isort: split
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention

from tests.megatron import desync_cases, te_layers
from tests.megatron import ladder_cases as cases
from tests.megatron.ladder_exact import interrupt, nothing_hidden
from tests.megatron.ladder_table import BF16, FULL, LLAMA, SP
from torch_plugins.config import W4A4, CrossLayerAttention

RECURRENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all", {}),
    "llama": ("last:3", LLAMA),
    "sequence-parallel": ("all", SP),
    "llama-sequence-parallel": ("1,3", {**LLAMA, **SP}),
    "bf16": ("all", BF16),
    "recompute": ("all", FULL),
}
SHARED = {"cross_layer_attention": CrossLayerAttention(2, kv_norm="separate")}
QUANTIZED = {"w4a4": W4A4(clip_init=2, kurtosis_weight=0)}
MLP = dict(recompute_granularity="selective", recompute_modules=["mlp"])
FROZEN = ("embedding.", "decoder.layers.0.", "decoder.layers.2.self_attention.linear_qkv.weight")


FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Names of norms in Megatron's own layers and in TransformerEngine's."""


def te_spec(**_: Any) -> Any:
    spec = get_gpt_layer_with_transformer_engine_spec()
    attention = spec.submodules.self_attention
    inner = replace(attention.submodules, core_attention=DotProductAttention)
    attention = replace(attention, submodules=inner)
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


@contextlib.contextmanager
def layers_of(spec: Any) -> Any:
    before, cases.get_gpt_layer_local_spec = cases.get_gpt_layer_local_spec, spec
    yield
    cases.get_gpt_layer_local_spec = before


def hiding(frozen: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Whether logits and gradients are the same bits with nothing but the forward's reductions
    hidden, after a forward that was interrupted; and what is the same of the two models."""
    with nothing_hidden():
        plain = cases.build("1-3", **options)
    model = cases.build("1-3", **options)
    model.load_state_dict(plain.state_dict())
    results = []
    for one in (model, plain):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen)))
        cases.run(one)  # from the second on, a layer knows the one that follows it
        interrupt(one)
        results.append(cases.run(one))
    (A, a), (B, b) = results
    same = torch.equal(A, B) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    alike = torch.tensor(float(same))
    dist.all_reduce(alike, op=dist.ReduceOp.MIN)
    parameters = [[name for name, _ in one.named_parameters()] for one in (model, plain)]
    return {
        "bitwise": bool(alike),
        "gradients": len(a),
        "difference": max(cases.difference(a, b), (A - B).abs().max().item()),
        "apart": sum("ladder_norm" in name for name, _ in model.named_modules()),
        "same parameters": parameters[0] == parameters[1],
        "same keys": list(model.state_dict()) == list(plain.state_dict()),
        "same shards": shards(model) == shards(plain),
    }


def shards(model: Any) -> dict[str, Any]:
    """Where each tensor of a checkpoint lies, by its key; and the keys of what is no tensor."""
    state = model.sharded_state_dict().values()
    return {shard.key: getattr(shard, "global_offset", None) for shard in state}


def fused(tensors: dict[str, Any], first: str = "") -> dict[str, Any]:
    """Tensors of Megatron's own layers, those whose name begins so, under TransformerEngine's."""
    for old, new in FUSED.items():
        tensors = {name.replace(first + old, first + new): x for name, x in tensors.items()}
    return tensors


def compare(model: Any, local: Any, step: Callable[[Any], Any], first: str = "") -> dict[str, Any]:
    """A model with the weights of one of Megatron's own layers: logits and gradients of a step."""
    weights = {name: value for name, value in local.state_dict().items() if value is not None}
    missing, unexpected = model.load_state_dict(fused(weights, first), strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") for name in missing)
    (A, a), (B, b) = step(model), step(local)
    logits = (A - B).abs().max().item() / B.abs().max().item()
    return {"logits": logits, "gradients": cases.difference(a, fused(b, first))}


def against_local(**options: Any) -> dict[str, Any]:
    """The ladder of Megatron's own layers with the same weights."""
    with layers_of(get_gpt_layer_local_spec):
        local = cases.build("all", **options)
    return compare(cases.build("all", **options), local, cases.run)


def desync(**options: Any) -> dict[str, Any]:
    """Desync Residual, whose norms are taken out of the linears but in the first layer, a standard
    one: as of Megatron's own layers."""
    options = {**options, "dtype": torch.float32}
    with patch.object(desync_cases, "get_gpt_layer_local_spec", get_gpt_layer_local_spec):
        local = desync_cases.build("11,00,10,01", **options)
    model = desync_cases.build("11,00,10,01", **options)
    found, wanted = (
        {key: place for key, place in shards(one).items() if "_extra_state" not in key}
        for one in (model, local)
    )
    result = compare(model, local, desync_cases.step, first="layers.0.")
    return {**result, "same shards": found == wanted}


def weights_arrive_late() -> dict[str, Any]:
    """The same logits when weights are there from their module's call on, as overlapping their
    gather has it; before, they are NaN."""
    model = cases.build("all", **SP)
    cases.run(model)
    before, _ = cases.run(model)
    weights = {parameter: parameter.data.clone() for parameter in model.parameters()}

    def arrive(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(weights[parameter])

    for module in model.modules():
        module.register_forward_pre_hook(arrive)
    for parameter in weights:
        parameter.data.fill_(float("nan"))
    after, _ = cases.run(model)
    return {"logits": (after - before).abs().max().item()}


def eight_bits() -> dict[str, Any]:
    """With FP8 TransformerEngine's linears stay as they are."""
    layer = cases.build("all", fp8="hybrid", fp8_recipe="tensorwise", **SP).decoder.layers[1]
    linears = [layer.self_attention.linear_qkv, layer.mlp.linear_fc1]
    return {
        "classes": [type(linear).__mro__[0].__module__ for linear in linears],
        "entrances": len(layer.entrances),
    }


def main(output: str) -> None:
    cases.start()
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(cases.against_recurrence, *case)
        for name, case in RECURRENCE.items()
    }
    todo |= {
        "local": against_local,
        "local-sequence-parallel": lambda: against_local(**SP),
        "order": cases.order,
        "order-sequence-parallel": lambda: cases.order(**SP),
        "collectives": cases.collectives,
        "collectives-sequence-parallel": lambda: cases.collectives(**SP),
        "collectives-recompute-sequence-parallel": lambda: cases.collectives(**SP, **FULL),
        "late": cases.never_read_early,
        "late-sequence-parallel": lambda: cases.never_read_early(**SP),
        "eight-bits": eight_bits,
        "layers": te_layers.found,
        "desync": desync,
        "desync-sequence-parallel": lambda: desync(**SP),
        "weights-arrive-late": weights_arrive_late,
    }
    for name, layout in {"": {}, "-sequence-parallel": SP}.items():
        todo |= {
            f"hiding{name}": functools.partial(hiding, **layout),
            f"hiding-bf16{name}": functools.partial(hiding, **LLAMA, **BF16, **layout),
            f"hiding-recompute{name}": functools.partial(hiding, **FULL, **layout),
            f"hiding-recompute-mlp{name}": functools.partial(hiding, **LLAMA, **MLP, **layout),
            f"hiding-frozen{name}": functools.partial(hiding, FROZEN, **layout),
            f"hiding-shared{name}": functools.partial(hiding, features=SHARED, **layout),
            f"hiding-quantized{name}": functools.partial(hiding, features=QUANTIZED, **layout),
        }
    with layers_of(te_spec), patch.object(desync_cases, "get_gpt_layer_local_spec", te_spec):
        cases.write(output, todo)


if __name__ == "__main__":
    main(sys.argv[1])
