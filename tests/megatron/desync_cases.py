"""Megatron models with Desync Residual against the naive reference, which goes rank by rank.

    desync_cases.py OUTPUT

Each of the gloo processes builds every model below in fp64, with weights of its own where it has
any; rank 0 puts the weights of all ranks together under Hugging Face names, and differentiates the
naive reference: logits and all gradients must be equal. One JSON line a case.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron.desync_table import CASES, FOUR, LAYERS, OPTIONS
from tests.megatron.ladder_cases import BATCH, SEQUENCE, SP, VOCAB, backward, inputs, start, write
from torch_plugins import reference
from torch_plugins.config import DesyncResidual, PowerMup

from megatron.core.inference.contexts import StaticInferenceContext  # isort: skip
from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

NAMES = {
    "embedding.word_embeddings": "model.embed_tokens",
    "output_layer": "lm_head",
    "decoder.final_layernorm": "model.norm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "decoder.layers": "model.layers",
}


def build(pattern: str | None, multiplier: float = 1, **options: Any) -> GPTModel:
    """A GPT in fp64, or another ``dtype``, with a pattern of Desync Residual, or a standard one."""
    size, dtype = dist.get_world_size(), options.pop("dtype", torch.float64)
    options = {**OPTIONS, "num_query_groups": size, "tensor_model_parallel_size": size, **options}
    config = TransformerConfig(**options)
    if pattern is not None:
        feature = DesyncResidual(pattern, size)
        config.megatron_plugins = {
            "desync_residual": feature,
            "power_mup": PowerMup(residual_multiplier=multiplier),
        }
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(
            normalization=config.normalization, qk_layernorm=config.qk_layernorm
        ),
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(dtype)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        shape = (size, *parameter.shape) if own(parameter) else parameter.shape
        noise = torch.randn(shape, generator=draw, dtype=torch.float64)
        part = noise[dist.get_rank()] if own(parameter) else noise
        parameter.data += 0.3 * part if parameter.dim() == 1 else 0
        parameter.data *= 3 if "linear" in name and parameter.dim() == 2 else 1
    return model


def own(parameter: Tensor) -> bool:
    """Whether a rank's parameter is a part, or another one, of what all ranks have."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def step(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one training step; replicated ones as Megatron sums them."""
    model.zero_grad()
    logits = model(*inputs(), runtime_gather_output=True)
    backward(logits)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = gradients[name] = parameter.grad.clone()
        summed = getattr(parameter, "sequence_parallel", False) or "q_layer" in name
        if summed or "k_layer" in name:
            dist.all_reduce(gradient)
    return logits.detach(), gradients


def together(model: GPTModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of all ranks, one for each parameter, as those of the whole model."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, tensors)
    apart = {name for name, parameter in model.named_parameters() if own(parameter)}
    whole: dict[str, Tensor] = {}
    for name in tensors:
        parts = [each[name] for each in everywhere]
        target = name
        for ours, theirs in NAMES.items():
            target = target.replace(ours, theirs)
        if "linear_qkv" in name:
            groups = model.config.num_query_groups
            heads = torch.cat(parts).unflatten(0, (groups, -1, model.config.kv_channels))
            sizes = [heads.shape[1] - 2, 1, 1]
            for letter, part in zip("qkv", heads.split(sizes, dim=1), strict=True):
                key = target.replace("self_attention.linear_qkv", f"self_attn.{letter}_proj")
                whole[key] = part.flatten(0, 2)
        elif "linear_fc1" in name:
            halves = zip(*(part.chunk(2) for part in parts), strict=True)
            gated = model.config.gated_linear_unit
            found = [torch.cat(half) for half in halves] if gated else [torch.cat(parts)]
            for kind, part in zip(("gate", "up") if gated else ("up",), found, strict=True):
                whole[target.replace("linear_fc1", f"{kind}_proj")] = part
        elif name not in apart:
            assert all(torch.allclose(part, parts[0], rtol=1e-13) for part in parts), name
            whole[target] = parts[0]
        else:
            whole[target] = torch.cat(parts, dim=model.get_parameter(name).partition_dim)
    return whole


def against_reference(
    pattern: str, options: dict[str, Any], multiplier: float = 1
) -> dict[str, Any]:
    model = build(pattern, multiplier, **options)
    logits, gradients = step(model)
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    weights, found = together(model, parameters), together(model, gradients)
    config = model.config
    fields = {
        "num_hidden_layers": LAYERS,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": config.kv_channels,
        "hidden_act": "silu" if config.gated_linear_unit else "gelu",
        "normalization": config.normalization.lower(),
        "norm_eps": config.layernorm_epsilon,
        "rope_parameters": {"rope_theta": 10000},
        "residual_multiplier": multiplier,
        "desync_residual": {"pattern": pattern, "ranks": dist.get_world_size()},
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    expected = reference.logits(weights, fields, inputs()[0])
    backward(expected)
    off = {
        name: ((found[name] - weight.grad).abs().max() / weight.grad.abs().max()).item()
        for name, weight in weights.items()
    }
    other = "last" if pattern == "2x" else "2x"
    changed = {**fields, "desync_residual": {"pattern": other, "ranks": dist.get_world_size()}}
    worst = max(off, key=lambda name: off[name])
    return {
        "logits": relative(logits, expected),
        "gradients": off[worst],
        "worst": worst,
        "count": len(off),
        "other pattern": relative(reference.logits(weights, changed, inputs()[0]), expected),
    }


def relative(A: Tensor, B: Tensor) -> float:
    return ((A - B).abs().max() / B.abs().max()).item()


def collectives(pattern: str | None, **options: Any) -> dict[str, Any]:
    """In the layers, forward and backward, by kind; embedding and head have the same in all."""
    model = build(pattern, **options)
    found = {}
    logits = model(*inputs())
    for name in ("forward", "backward"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            logits = model(*inputs()) if name == "forward" else backward(logits)
        kinds = Counter(e.name for e in profile.events() if e.name.startswith("c10d::"))
        found[name] = sum(kinds.values())
    return found


def recomputed(**options: Any) -> dict[str, Any]:
    """With recomputation and dropout: the same to the bit."""
    from megatron.core import tensor_parallel

    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
    results = []
    for more in ({}, options):
        torch.manual_seed(0)
        model = build("4x", **dropout, **more)
        tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        torch.manual_seed(5)
        results.append(step(model))
    (A, a), (B, b) = results
    still, _ = step(model.eval())
    return {
        "logits": relative(A, B),
        "gradients": max(relative(a[name], b[name]) for name in a),
        "drops": relative(A, still),
    }


def static_inference(**options: Any) -> dict[str, Any]:
    """Prefill and decode through a static context give the full forward's logits."""
    model = build("4x", **options).float().eval()
    tokens, positions, mask = inputs()
    context = StaticInferenceContext(BATCH, SEQUENCE)
    with torch.no_grad():
        full = model(tokens, positions, mask, runtime_gather_output=True)
        cached = {"inference_context": context, "runtime_gather_output": True}
        parts = [model(tokens[:, :9], positions[:, :9], mask[..., :9, :9], **cached)]
        for at in range(9, SEQUENCE):
            context.sequence_len_offset = at
            last = slice(at, at + 1)
            parts.append(model(tokens[:, last], positions[:, last], None, **cached))
    return {"logits": relative(torch.cat(parts, dim=1)[:, -7:], full[:, -7:])}


def main(output: str) -> None:
    start()
    cases = {name: functools.partial(against_reference, *case) for name, case in CASES.items()}
    if dist.get_world_size() == 4:
        write(output, {name: cases[name] for name in FOUR})
        return
    for pattern in (None, "2x", "4x", "last"):
        for layout in ({}, SP):
            name = f"collectives-{pattern}" + ("-sequence-parallel" if layout else "")
            cases[name] = functools.partial(collectives, pattern, **layout)
    cases["recomputed"] = lambda: recomputed(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    cases["static-inference"] = static_inference
    write(output, cases)


if __name__ == "__main__":
    main(sys.argv[1])
