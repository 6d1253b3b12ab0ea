"""Layers that share keys and values against the recurrence written out by hand.

Each of the gloo processes of cla_inference.py runs every case below. The recurrence written out
calls the norms, projections, core attentions and MLPs of a *stock* model, in which every layer
projects keys and values; those of consumers are left aside. Logits and all gradients must be equal.

A stands for a tensor of the model that shares, B for one of the reference.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugins import cpu

cpu.install()
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.megatron.cla_table import AGAINST_RECURRENCE, RECOMPUTE, RECOMPUTED, STATIC_INFERENCE
from tests.megatron.ladder_cases import backward, difference, gradients, inputs, run
from tests.megatron.ladder_table import BATCH, GPT, LAYERS, SEQUENCE, VOCAB, WORLD
from torch_plugins.config import CrossLayerAttention, LadderResidual


def build(feature: CrossLayerAttention | None, ladder: str | None, **options: Any) -> GPTModel:
    """A GPT that shares, or the stock one."""
    positions = options.pop("position_embedding_type", "rope")
    config = TransformerConfig(**{**GPT, **options})
    if feature is not None:
        config.megatron_plugins = {"cross_layer_attention": feature}
        config.hetereogenous_dist_checkpoint = True
        if ladder is not None:
            config.megatron_plugins["ladder_residual"] = LadderResidual(ladder)
    norm, qk_norm = config.normalization, config.qk_layernorm
    spec = get_gpt_layer_local_spec(normalization=norm, qk_layernorm=qk_norm)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=norm)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type=positions,
        share_embeddings_and_output_weights=False,
    )
    return randomized(model)


def randomized(model: Any) -> Any:
    """The model with random weights, in its dtype."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        shape = list(parameter.shape)
        axis = getattr(parameter, "partition_dim", 0)
        if sharded:
            shape[axis] *= WORLD
        value = torch.randn(shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.2)
        parameter.data.copy_(value.chunk(WORLD, axis)[dist.get_rank()] if sharded else value)
    return model.to(model.config.params_dtype) if model.config.bf16 else model


def gathered(local: Tensor) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(WORLD)]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def of_stock(model: GPTModel, name: str, stock: Callable[[str], Any]) -> Any:
    """What the parameter ``name`` of a model that shares is in a stock model: the same, or rows of
    its ``linear_qkv``, ``[K, H / K queries, key, value]``."""
    parameter = model.get_parameter(name)
    value = stock(name.replace("linear_kv", "linear_qkv"))
    if "self_attention.linear_" not in name or "proj" in name or parameter.shape == value.shape:
        return value
    config = model.config
    whole = gathered(value)
    heads = whole.view(config.num_query_groups, -1, config.kv_channels, *whole.shape[1:])
    rows = heads[:, -2:] if "linear_kv" in name else heads[:, :-2]
    return rows.reshape(-1, *whole.shape[1:]).chunk(WORLD)[dist.get_rank()]


def pair(
    feature: CrossLayerAttention, ladder: str | None, **options: Any
) -> tuple[GPTModel, GPTModel]:
    """A model that shares and the stock model with the same weights, and with the first one's norms
    of keys and values."""
    stock, model = build(None, None, **options), build(feature, ladder, **options)
    for layer, other in zip(model.decoder.layers, stock.decoder.layers, strict=True):
        if getattr(layer.self_attention, "kv_norm", None) is not None:
            other.self_attention.kv_norm = copy.deepcopy(layer.self_attention.kv_norm)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(of_stock(model, name, lambda name: stock.get_parameter(name).data))
    return model, stock


def recurrence(model: GPTModel, feature: CrossLayerAttention, ladder: str | None) -> Tensor:
    """Logits [b, s, v] out of a stock model's modules."""
    tokens, positions, mask = inputs()
    ladder_layers = LadderResidual(ladder or "none").resolve(LAYERS)
    producers = feature.resolve(LAYERS)
    rope = None
    if model.position_embedding_type == "rope":
        rope = model.rotary_pos_emb(SEQUENCE)
    kv: dict[int, tuple[Tensor, Tensor]] = {}
    prev = h = model.embedding(input_ids=tokens, position_ids=positions)

    def rotated(x: Tensor) -> Tensor:
        return x if rope is None else apply_rotary_pos_emb(x, rope, config=model.config)

    def added(output_with_bias: tuple[Tensor, Tensor | None], stream: Tensor) -> Tensor:
        output, bias = output_with_bias
        return stream + (output if bias is None else output + bias)

    def attention(index: int, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        layer = model.decoder.layers[index]
        self_attention = layer.self_attention
        normed = layer.input_layernorm(stream)
        query, key, value = self_attention.get_query_key_value_tensors(normed)
        if producers[index] == index:
            if feature.kv_norm == "separate":
                normed = self_attention.kv_norm(stream)
                _, key, value = self_attention.get_query_key_value_tensors(normed)
            kv[index] = rotated(key), value
        out = self_attention.core_attention(
            rotated(query),
            *kv[producers[index]],
            mask,
            attn_mask_type=self_attention.attn_mask_type,
        )
        return self_attention.linear_proj(out)

    for index, layer in enumerate(model.decoder.layers):

        def mlp(stream: Tensor, layer: Any = layer) -> tuple[Tensor, Tensor | None]:
            return layer.mlp(layer.pre_mlp_layernorm(stream))

        if index in ladder_layers:
            after_attention = added(attention(index, prev), h)
            after_mlp = added(mlp(h), after_attention)
        else:
            after_attention = added(attention(index, h), h)
            after_mlp = added(mlp(after_attention), after_attention)
        prev, h = after_attention, after_mlp
    logits, _ = model.output_layer(model.decoder.final_layernorm(h))
    return logits.transpose(0, 1)


def against_recurrence(
    feature: CrossLayerAttention, ladder: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    model, stock = pair(feature, ladder, **options)
    A, B = model(*inputs()), recurrence(stock, feature, ladder)
    standard = stock(*inputs())
    backward(A)
    backward(B)
    b = {
        name: of_stock(model, name, lambda name: stock.get_parameter(name).grad)
        for name, _ in model.named_parameters()
    }
    config = model.config
    queries = config.num_attention_heads * config.kv_channels // WORLD
    keys = [name for name, _ in model.named_parameters() if "linear_qkv.weight" in name]
    widths = [model.get_parameter(name).shape[0] for name in keys]
    return {
        "logits": (A - B).abs().max().item() / B.abs().max().item(),
        "gradients": difference(gradients(model), {n: grad.float() for n, grad in b.items()}),
        "from standard": (A - standard).abs().max().item() / B.abs().max().item(),
        "queries only": [width == queries for width in widths],
        "unused": [name for name, p in model.named_parameters() if p.grad is None],
        "sharded keys": sorted({shard.key for shard in model.sharded_state_dict().values()}),
    }


def factor_one() -> dict[str, Any]:
    """Groups of one layer are the standard model, bit by bit."""
    model, stock = pair(CrossLayerAttention(1), None)
    (A, a), (B, b) = run(model), run(stock)
    return {
        "equal": torch.equal(A, B) and all(torch.equal(a[name], b[name]) for name in b),
        "same modules": str(model) == str(stock),
    }


def recomputed(
    feature: CrossLayerAttention, ladder: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """How far logits and gradients of each recomputation are from those of none."""
    options = {"hidden_dropout": 0.2, "attention_dropout": 0.1, **options}
    model = build(feature, ladder, **options)
    A, a = run(model)
    found = {}
    for name, recompute in RECOMPUTE.items():
        if name == "distributed" and options.get("sequence_parallel"):
            continue  # Megatron refuses the two together
        B, b = run(build(feature, ladder, **options, **recompute))
        found[name] = difference({"logits": A, **a}, {"logits": B, **b})
    still, _ = run(model.eval())
    return {"differences": found, "drops": (A - still).abs().max().item()}


def static_inference(
    feature: CrossLayerAttention, ladder: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Prefill and decode through a static context; what its caches hold."""
    model = build(feature, ladder, **options).eval()
    tokens, positions, mask = inputs()
    context = StaticInferenceContext(BATCH, SEQUENCE)
    whole = {"runtime_gather_output": True}
    cached = {**whole, "inference_context": context}
    with torch.no_grad():
        full = model(tokens, positions, mask, **whole)
        parts = [model(tokens[:, :9], positions[:, :9], mask[..., :9, :9], **cached)]
        for step in range(9, SEQUENCE):
            context.sequence_len_offset = step
            last = slice(step, step + 1)
            parts.append(model(tokens[:, last], positions[:, last], None, **cached))
    last = SEQUENCE - 8  # 0.17 gives the logits of a prompt's last token only
    difference = (torch.cat(parts, dim=1)[:, -8:] - full[:, last:]).abs().max().item()
    caches = context.key_value_memory_dict
    storages = {x.untyped_storage().data_ptr(): x.nbytes for pair in caches.values() for x in pair}
    return {
        "logits": difference / full.abs().max().item(),
        "layers": sorted(caches),
        "bytes": sum(storages.values()),
    }


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(against_recurrence, *case)
        for name, case in AGAINST_RECURRENCE.items()
    }
    for name, case in RECOMPUTED.items():
        found[f"recomputed {name}"] = functools.partial(recomputed, *case)
    for name in STATIC_INFERENCE:
        case = AGAINST_RECURRENCE[name]
        found[f"static inference {name}"] = functools.partial(static_inference, *case)
    return {**found, "factor one": factor_one}
