"""Models with experts of real Megatron layers against the sums written out, in two processes.

Each of the gloo processes runs every case below; rank 0 writes one JSON line a case. A stands for
what the model gives, B for the naive one.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_plugins import cpu

cpu.install()
from megatron.core import dist_checkpointing
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.megatron import ladder_cases
from tests.megatron.dense_moe_naive import Naive, mutual_information_losses
from tests.megatron.dense_moe_packed import packed
from tests.megatron.dense_moe_table import (
    BATCH,
    BF16,
    BOTH,
    GATED,
    GPT,
    INFERENCE,
    RECOMPUTE,
    SEQUENCE,
    SP,
    STEPS,
    VOCAB,
    WORLD,
    feature_of,
    groups_of,
)
from torch_plugins.config import CrossLayerAttention, LadderResidual

Full = dict[str, Tensor]
LOSS_SCALE = 8.0


def features_in(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """``config.megatron_plugins``; takes the features' own keys out of ``options``."""
    found: dict[str, Any] = {"dense_moe": feature_of(settings)}
    if (ladder := options.pop("ladder", None)) is not None:
        found = {"ladder_residual": LadderResidual(ladder), **found}
    if (sharing := options.pop("sharing", None)) is not None:
        found["cross_layer_attention"] = CrossLayerAttention(sharing)
    return found


def build(settings: dict[str, Any], **options: Any) -> tuple[GPTModel, Full]:
    """A GPT with experts and, by name, the whole of its random weights."""
    features = features_in(settings, options)
    feature = features["dense_moe"]
    config = TransformerConfig(
        **{
            **GPT,
            "num_query_groups": groups_of(feature),
            "ffn_hidden_size": 48,
            "gated_linear_unit": feature.gated,
            "activation_func": F.silu if feature.gated else F.gelu,
            **options,
        }
    )
    config.megatron_plugins = features
    config.hetereogenous_dist_checkpoint = "cross_layer_attention" in features
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = gpt(config, spec)
    full = {}
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        if (axis := axis_of(parameter)) is not None:
            shape[axis] *= WORLD
        value = torch.randn(shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.25)
        full[name] = value + 1 if parameter.dim() == 1 else value
        parameter.data.copy_(local(config, name, parameter, full[name]))
    return (model.to(config.params_dtype) if config.bf16 else model), full


def gpt(config: Any, spec: Any) -> GPTModel:
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    )


def axis_of(parameter: Any) -> int | None:
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return parameter.partition_dim if sharded else None


def local(config: Any, name: str, parameter: Any, whole: Tensor) -> Tensor:
    """This process's part of a whole weight, or of its gradient: gates come first in both."""
    axis = axis_of(parameter)
    if axis is None:
        return whole
    if config.gated_linear_unit and "linear_fc1" in name:
        return whole.unflatten(0, (2, -1)).chunk(WORLD, 1)[dist.get_rank()].flatten(0, 1)
    return whole.chunk(WORLD, axis)[dist.get_rank()]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels, ``[b, s]`` each."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(0, VOCAB, (count, 2, BATCH, SEQUENCE), generator=generator)
    return [(tokens, labels) for tokens, labels in both]


def positions_and_mask() -> tuple[Tensor, Tensor]:
    mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]
    return torch.arange(SEQUENCE).expand(BATCH, SEQUENCE), mask


def step(model: GPTModel, micro_batches: int = 2) -> list[float]:
    """One step through Megatron's schedule with a loss scale; returns the losses."""
    config = model.config
    config.grad_scale_func = lambda loss: loss * LOSS_SCALE
    positions, mask = positions_and_mask()
    losses = []

    def forward(data: Any, model: GPTModel) -> Any:
        tokens, labels = next(data)
        output = model(tokens, positions, mask, labels=labels)

        def loss_of(per_token: Tensor) -> Any:
            total, count = per_token.float().sum(), torch.tensor(per_token.numel())
            losses.append((total / count).item())
            return total, count.int(), {}

        return output, loss_of

    model.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches(micro_batches)),
        model=[model],
        num_microbatches=micro_batches,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    return losses


def gradients(model: GPTModel) -> dict[str, Tensor]:
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def naive_gradients(
    model: GPTModel, full: Full, settings: dict[str, Any], ladder: Any, sharing: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and this process's gradients of the same step, losses added up by hand."""
    weights = {name: value.clone().requires_grad_() for name, value in full.items()}
    config, losses = model.config, []
    for tokens, labels in batches(2):
        naive = Naive(weights, feature_of(settings), config)
        logits = naive.logits(tokens, ladder, sharing)
        main = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        losses.append(main.item())
        mean = main + mutual_information_losses(naive)
        weight = tokens.numel() if config.calculate_per_token_loss else 1 / 2
        (mean * weight * LOSS_SCALE).backward()
    parameters = dict(model.named_parameters())
    return losses, {
        name: local(config, name, parameters[name], weight.grad)
        for name, weight in weights.items()
        if weight.grad is not None
    }


def against_naive(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    ladder, sharing = options.get("ladder"), options.get("sharing")
    model, full = build(settings, **options)
    A, B = step(model), naive_gradients(model, full, settings, ladder, sharing)
    found = gradients(model)
    unweighted = {**settings, "mi_weight_mlp": 0.0, "mi_weight_attention": 0.0}
    without = naive_gradients(model, full, unweighted, ladder, sharing)[1]
    routers = {name for name in found if "router" in name}
    return {
        "losses": max(abs(a - b) for a, b in zip(A, B[0], strict=True)),
        "gradients": ladder_cases.difference(found, B[1]),
        "from losses": ladder_cases.difference(
            {name: without[name] for name in routers}, {name: B[1][name] for name in routers}
        ),
        "unused": [name for name, p in model.named_parameters() if p.grad is None],
        "sharded keys": sorted({shard.key for shard in model.sharded_state_dict().values()}),
    }


def recomputed(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """How far gradients of each recomputation are from those of none, the routers' losses in."""
    model, _ = build(settings, **options)
    step(model)
    plain, found = gradients(model), {}
    for name, recompute in RECOMPUTE.items():
        model, _ = build(settings, **options, **recompute)
        step(model)
        found[name] = ladder_cases.difference(gradients(model), plain)
    return found


def inference(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Evaluation, and prefill and decode through a static context, against the naive rules."""
    options = dict(options)
    ladder, sharing = options.get("ladder"), options.get("sharing")
    found = {}
    for parallel, more in (("", {}), (", sequence parallel", SP)):
        model, full = build(settings, **options, **more)
        model.eval()
        naive = Naive(full, feature_of(settings), model.config, keep=True)
        (tokens, _), (positions, mask) = batches(1)[0], positions_and_mask()
        whole = {"runtime_gather_output": True}
        with torch.no_grad():
            A, B = model(tokens, positions, mask, **whole), naive.logits(tokens, ladder, sharing)
        found[f"evaluation{parallel}"] = relative(A, B)
        if not more:
            found["cached"] = relative(cached(model, tokens), B[:, -8:])
            found["left out"] = left_out(model, tokens)
            naive.keep = False
            with torch.no_grad():
                found["from dense"] = relative(naive.logits(tokens, ladder, sharing), B)
        if feature_of(settings).inference != "dense":
            found[f"packed{parallel}"] = packed(model, tokens, positions, mask)
    return found


def left_out(model: GPTModel, tokens: Tensor) -> list[float]:
    """Share of heads that are not computed, in the first layer: projected queries, keys and values
    together; outputs."""
    outputs: list[Tensor] = []
    attention = model.decoder.layers[0].self_attention
    hooks = [
        attention.linear_qkv.register_forward_hook(lambda *call: outputs.append(call[-1][0])),
        attention.core_attention.register_forward_hook(lambda *call: outputs.append(call[-1])),
    ]
    with torch.no_grad():
        model(tokens, *positions_and_mask())
    for hook in hooks:
        hook.remove()
    heads = [output.unflatten(-1, (-1, model.config.kv_channels)) for output in outputs]
    return [(each == 0).all(-1).float().mean().item() for each in heads]


def cached(model: GPTModel, tokens: Tensor) -> Tensor:
    """Logits of the last eight tokens, the last seven decoded one by one."""
    positions, mask = positions_and_mask()
    context = StaticInferenceContext(BATCH, SEQUENCE)
    options = {"runtime_gather_output": True, "inference_context": context}
    with torch.no_grad():
        parts = [model(tokens[:, :9], positions[:, :9], mask[..., :9, :9], **options)]
        for place in range(9, SEQUENCE):
            context.sequence_len_offset = place
            last = slice(place, place + 1)
            parts.append(model(tokens[:, last], positions[:, last], None, **options))
    return torch.cat(parts, dim=1)[:, -8:]


def relative(A: Tensor, B: Tensor) -> float:
    return (A.float() - B).abs().max().item() / B.abs().max().item()


def extremes() -> dict[str, float]:
    """A process none of whose experts any token keeps; and one token."""
    settings = {**BOTH, "attention_experts": 0, "router": "linear"}
    settings |= {"inference": "top-k", "top_k": 1}
    model, full = build(settings)
    model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.router.weight"):
            one = full[name][0].clone()  # experts 2 and 3 are never the best
            rows = torch.stack([one, -one, 0 * one, 0 * one])
            full[name] = rows
            parameter.data.copy_(rows)
    naive = Naive(full, feature_of(settings), model.config, keep=True)
    (tokens, _), (positions, mask) = batches(1)[0], positions_and_mask()
    whole = {"runtime_gather_output": True}
    with torch.no_grad():
        B = naive.logits(tokens, None, None)
        A = model(tokens, positions, mask, **whole)
        one = model(tokens[:1, :1], positions[:1, :1], mask[..., :1, :1], **whole)
    return {"idle process": relative(A, B), "one token": relative(one, B[:1, :1])}


def bf16() -> dict[str, Any]:
    """Losses of half precision, and the dtypes of gradients."""
    model, full = build(BOTH, **BF16, **SP)
    A, (B, _) = step(model), naive_gradients(model, full, BOTH, None, None)
    finite = all(bool(torch.isfinite(grad).all()) for grad in gradients(model).values())
    return {"losses": max(abs(a - b) for a, b in zip(A, B, strict=True)), "finite": finite}


def stock_moe(settings: dict[str, Any], top_k: int, experts_over: int) -> dict[str, Any]:
    """A checkpoint of ours in Megatron's own MoELayer, experts over ``experts_over`` processes."""
    feature = feature_of(settings)
    model, full = build(settings)
    with tempfile.TemporaryDirectory() as place:
        folder = [place]
        dist.broadcast_object_list(folder)
        dist_checkpointing.save({"model": model.sharded_state_dict()}, folder[0])
        stock = stock_model(feature, top_k, experts_over, model.config)
        wanted = {"model": stock.sharded_state_dict()}
        stock.load_state_dict(dist_checkpointing.load(wanted, folder[0])["model"])
        dist.barrier()
    stock.eval()
    settings = {**settings, "inference": "top-k", "top_k": top_k}
    naive = Naive(full, feature_of(settings), model.config, keep=True)
    (tokens, _), (positions, mask) = batches(1)[0], positions_and_mask()
    with torch.no_grad():
        A = stock(tokens, positions, mask, runtime_gather_output=True)
        B = naive.logits(tokens, None, None)
        naive.keep = False
        dense = naive.logits(tokens, None, None)
    return {"logits": relative(A, B), "from dense": relative(dense, B)}


def stock_model(feature: Any, top_k: int, experts_over: int, like: Any) -> GPTModel:
    options = {
        **GPT,
        "num_query_groups": like.num_query_groups,
        "ffn_hidden_size": like.ffn_hidden_size // feature.num_experts,
        "moe_ffn_hidden_size": like.ffn_hidden_size // feature.num_experts,
        "gated_linear_unit": like.gated_linear_unit,
        "activation_func": like.activation_func,
        "num_moe_experts": feature.num_experts,
        "moe_router_topk": top_k,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": experts_over,
        "expert_tensor_parallel_size": WORLD // experts_over,
        **SP,
    }
    config = TransformerConfig(**options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return gpt(config, spec)


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"step {name}": functools.partial(against_naive, *case) for name, case in STEPS.items()
    }
    for name, case in INFERENCE.items():
        found[f"inference {name}"] = functools.partial(inference, *case)
    found["recomputed"] = functools.partial(recomputed, BOTH, {})
    found["recomputed sequence parallel"] = functools.partial(recomputed, GATED, SP)
    found["extremes"] = extremes
    found["bf16"] = bf16
    for name, settings in {"gated": GATED, "gelu": {**GATED, "gated": False}}.items():
        for top_k, processes in ((4, 1), (4, 2), (2, 2)):
            found[f"stock {name}, {top_k} of 4, over {processes}"] = functools.partial(
                stock_moe, settings, top_k, processes
            )
    return found


def main(output: str) -> None:
    ladder_cases.start()
    ladder_cases.write(output, cases())


if __name__ == "__main__":
    main(sys.argv[1])
