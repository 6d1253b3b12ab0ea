"""Hybrid stacks whose attention layers share keys and values: against a GPT with the same weights,
and, with layers of other kinds between, against the recurrence written out.

Each of the gloo processes runs every case. A stands for a tensor of the stack, B for one of the
reference. In place of Mamba, whose kernels need a GPU, stands the mixer of hybrid_cases.py.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.inference.config import MambaInferenceStateConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_plugins.cross_layer_attention import translate
from tests.megatron import cla_cases, cla_inference, ladder_cases
from tests.megatron.cla_cases import of_stock, randomized
from tests.megatron.cla_hybrid_table import AGAINST_GPT, BETWEEN, INFERENCE, MIXED, RECOMPUTE
from tests.megatron.cla_table import CLA2
from tests.megatron.hybrid_cases import SPEC, of, of_gpt
from tests.megatron.hybrid_table import PATTERN
from tests.megatron.ladder_cases import backward, difference, gradients, inputs, run
from tests.megatron.ladder_table import GPT, LLAMA
from torch_plugins.config import ConfigError, CrossLayerAttention, LadderResidual

try:
    from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop
except ImportError:  # 0.17 and 0.18
    interop = None

gpt = cla_cases.build


def configured(
    feature: CrossLayerAttention | None, ladder: str | None, num_layers: int, **options: Any
) -> Any:
    config = TransformerConfig(**{**GPT, "num_layers": num_layers, **options})
    if feature is not None:
        config.megatron_plugins = {"cross_layer_attention": feature}
        if ladder is not None:
            config.megatron_plugins["ladder_residual"] = LadderResidual(ladder)
    return config


def hybrid(
    feature: CrossLayerAttention | None,
    ladder: str | None,
    pattern: str = PATTERN,
    **options: Any,
) -> Any:
    """A stack that shares, or the stock one."""
    return randomized(of(configured(feature, ladder, len(pattern), **options), pattern))


def translated(model: Any, expected: Any, pattern: str) -> bool | None:
    """Whether a stack asks a GPT's checkpoint for what a GPT asks for; None before 0.19."""
    if interop is None:
        return None
    asked, gpts = model.sharded_state_dict(), expected.sharded_state_dict()
    interop.retarget_sharded_state_dict_to_gpt_checkpoint(
        asked, interop.gpt_compatible_layer_maps(pattern)
    )
    translate(asked)
    found = []
    for state in (asked, gpts):
        apply_factories(state)
        lists = (value if isinstance(value, list) else [value] for value in state.values())
        entries = [entry for one in lists for entry in one if hasattr(entry, "prepend_axis_num")]
        # Only a GPT of local MoE layers has its norms under another name, without the feature too.
        norms = ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm") if "E" in pattern else ()
        found.append(
            sorted(
                (entry.key, entry.global_shape, entry.global_offset, entry.prepend_axis_num)
                for entry in entries
                if not any(norm in entry.key for norm in norms)
            )
        )
    return found[0] == found[1]


def against_gpt(
    feature: CrossLayerAttention,
    gpt_ladder: str | None,
    ladder: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    pattern = "*E" * 4 if "num_moe_experts" in options else PATTERN
    expected, model = (
        gpt(feature, gpt_ladder, **options),
        hybrid(feature, ladder, pattern, **options),
    )
    model.load_state_dict({of_gpt(name): value for name, value in expected.state_dict().items()})
    A, B = model(*inputs()), expected(*inputs())
    backward(A)
    backward(B)
    shards = (one.sharded_state_dict().values() for one in (model, expected))
    keys, gpt_keys = ({s.key for s in own if "self_attention" in s.key} for own in shards)
    return {
        "translated": translated(model, expected, pattern),
        "logits": (A - B).abs().max().item() / B.abs().max().item(),
        "gradients": difference(
            gradients(model), {of_gpt(name): grad for name, grad in gradients(expected).items()}
        ),
        "same sharded keys": keys == {of_gpt(key) for key in gpt_keys},
    }


def recurrence(model: Any, feature: CrossLayerAttention, pattern: str) -> Tensor:
    """Logits [b, s, v] out of a stock stack's modules, without rotation."""
    tokens, positions, mask = inputs()
    producers = feature.resolve(pattern.count("*"))
    kv: list[tuple[Tensor, Tensor]] = []
    x = model.embedding(input_ids=tokens, position_ids=positions)
    for symbol, layer in zip(pattern, model.decoder.layers, strict=True):
        if symbol == "M":
            x = layer(x)
            continue
        if symbol == "*":
            attention, normed = layer.self_attention, layer.input_layernorm(x)
            query, key, value = attention.get_query_key_value_tensors(normed)
            if feature.kv_norm == "separate" and hasattr(attention, "kv_norm"):
                _, key, value = attention.get_query_key_value_tensors(attention.kv_norm(x))
            kv.append((key, value))
            shared = kv[producers[len(kv) - 1]]
            mask_type = attention.attn_mask_type
            output = attention.core_attention(query, *shared, mask, attn_mask_type=mask_type)
            output, bias = attention.linear_proj(output)
        else:
            output, bias = layer.mlp(layer.pre_mlp_layernorm(x))
        x = x + (output if bias is None else output + bias)
    logits, _ = model.output_layer(model.decoder.final_norm(x))
    return logits.transpose(0, 1)


def between(feature: CrossLayerAttention, pattern: str, options: dict[str, Any]) -> dict[str, Any]:
    model, stock = (hybrid(one, None, pattern, **options) for one in (feature, None))
    for one in (model, stock):
        one.position_embedding_type = "none"
    for layer, other in zip(model.decoder.layers, stock.decoder.layers, strict=True):
        norm = getattr(getattr(layer, "self_attention", None), "kv_norm", None)
        if norm is not None:
            other.self_attention.kv_norm = copy.deepcopy(norm)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(of_stock(model, name, lambda name: stock.get_parameter(name).data))
    A, B, standard = model(*inputs()), recurrence(stock, feature, pattern), stock(*inputs())
    backward(A)
    backward(B)
    expected = {
        name: of_stock(model, name, lambda name: stock.get_parameter(name).grad)
        for name, _ in model.named_parameters()
    }
    return {
        "logits": (A - B).abs().max().item() / B.abs().max().item(),
        "gradients": difference(gradients(model), expected),
        "from standard": (A - standard).abs().max().item() / B.abs().max().item(),
    }


def recomputed() -> dict[str, Any]:
    """How far logits and gradients of each recomputation are from those of none."""
    options = {"hidden_dropout": 0.2, "attention_dropout": 0.1, **LLAMA}
    A, a = run(hybrid(CLA2, None, MIXED, **options))
    found = {}
    for name, recompute in RECOMPUTE.items():
        B, b = run(hybrid(CLA2, None, MIXED, **options, **recompute))
        found[name] = difference({"logits": A, **a}, {"logits": B, **b})
    return found


def interrupted() -> dict[str, Any]:
    """A forward that stopped inside a group leaves nothing for the next one."""
    model = hybrid(CLA2, None)
    A = model(*inputs())
    handle = model.decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(*inputs())
    except ZeroDivisionError:
        handle.remove()
    left = model.decoder.layers[0].channel.carry
    B = model(*inputs())
    now = model.decoder.layers[0].channel.carry
    return {"logits": (A - B).abs().max().item(), "left": left is not None, "now": now is not None}


def stage(pattern: str, noted: str | None, first: int, num_layers: int, spec: Any = SPEC) -> Any:
    """The stack of some layers of a model, as a pipeline stage builds it."""
    config = configured(CLA2, None, num_layers)
    if noted is not None:
        config.megatron_plugins_pattern = noted
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(
        spec,
        config,
        layer_type_list=list(pattern),
        pp_layer_offset=first,
        post_process=False,
        pg_collection=groups,
    )


def refused() -> dict[str, Any]:
    latent = get_gpt_layer_local_spec(multi_latent_attention=True)
    other = replace(SPEC, submodules=replace(SPEC.submodules, attention_layer=latent))
    stages: dict[str, tuple[Any, ...]] = {
        "unknown": ("*-*-", None, 0, 8),
        "other pattern": ("*-*-", "*-*-M*M*", 4, 8),
        "split": ("*-*-*", "*-|*-*-*", 2, 7),
        "no attention": ("M-M-", None, 0, 4),
        "too few": ("M-*-", None, 0, 4),
        "latent": ("*-*-", None, 0, 4, other),
    }
    errors = {}
    for name, given in stages.items():
        try:
            stage(*given)
        except ConfigError as error:
            errors[name] = str(error)
    own = stage("*-M*", "*-*-|*-M*", 4, 8)
    roles = [own.layers[i].self_attention.role for i in (0, 3)]
    return {**errors, "roles": [(role.index, role.producer, role.last) for role in roles]}


def dynamic(
    feature: CrossLayerAttention | None, ladder: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Through a dynamic context, which is told of Mamba layers where there are some."""
    pattern = options.get("pattern", PATTERN)
    states: dict[str, Any] = {}
    if "M" in pattern:
        shapes = dict(conv_states_shape=(2, 4), ssm_states_shape=(2, 2, 4))
        dtypes = dict(conv_states_dtype=torch.float32, ssm_states_dtype=torch.float32)
        mamba = MambaInferenceStateConfig(layer_type_list=list(pattern), **shapes, **dtypes)
        states["mamba_inference_state_config"] = mamba
    plain = cla_inference.context_for
    cla_inference.context_for = functools.partial(plain, **states)
    result = cla_inference.decode(feature, ladder, options)
    cla_inference.context_for = plain
    return result


def main(output: str) -> None:
    ladder_cases.start()
    cla_cases.build = cla_inference.build = hybrid
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"gpt {name}": functools.partial(against_gpt, *case) for name, case in AGAINST_GPT.items()
    }
    for name, between_case in BETWEEN.items():
        cases[f"between {name}"] = functools.partial(between, *between_case)
    for name, case_ in INFERENCE.items():
        cases[f"static {name}"] = functools.partial(cla_cases.static_inference, *case_)
    cases |= {"recomputed": recomputed, "interrupted": interrupted, "refused": refused}
    cases["stand-ins"] = cla_inference.stand_in
    for name, case_ in INFERENCE.items():
        cases[f"dynamic {name}"] = functools.partial(dynamic, *case_)
    cases["dynamic standard"] = functools.partial(dynamic, None, None, {"pattern": MIXED})
    ladder_cases.write(output, cases)


if __name__ == "__main__":
    main(sys.argv[1])
