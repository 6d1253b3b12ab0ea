"""Ladder models of real Megatron layers against the recurrence written out by hand.

Each of the gloo processes runs every case below; rank 0 writes one JSON line a case. The recurrence
written out calls the norms, attentions and MLPs of a *stock* model with the same weights, so
whatever differs is the ladder's: logits and all gradients must be equal.

A stands for a tensor of the ladder model, B for one of the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_plugins  # noqa: F401
from megatron_plugins import cpu

cpu.install()
warnings.filterwarnings("ignore")
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_plugins import reduction
from tests.megatron.ladder_order import notes
from tests.megatron.ladder_table import (
    AGAINST_RECURRENCE,
    BATCH,
    FULL,
    GPT,
    LAYERS,
    LLAMA,
    RECOMPUTED_NORM,
    SEQUENCE,
    SP,
    VOCAB,
)
from torch_plugins.config import LadderResidual, PowerMup


def build(ladder: str | None, multiplier: float = 1, **options: Any) -> GPTModel:
    """A GPT with the given ladder layers and residual multiplier, or the stock one; the same
    weights in both. ``features``: what else is on."""
    more = options.pop("features", {})
    config = TransformerConfig(**{**GPT, **options})
    if ladder is not None:
        mup = PowerMup(residual_multiplier=multiplier)
        config.megatron_plugins = {"ladder_residual": LadderResidual(ladder), "power_mup": mup}
        config.megatron_plugins.update(more)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        )
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return scrambled(model)


def scrambled(model: Any) -> Any:
    """The model with weights that show errors, in its dtype."""
    config = model.config
    if config.fp32_residual_connection:
        for name, module in model.named_modules():
            if (
                hasattr(module, "weight") and "norm" in name
            ):  # apex's and TE's norms cast, torch's cannot
                module.register_forward_pre_hook(lambda norm, x: x[0].to(norm.weight.dtype))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:  # biases start at zero and norms at one, which would hide errors
            size = parameter.numel() * dist.get_world_size()
            value = torch.randn(size, generator=generator) * 0.5
            replicated = not getattr(parameter, "tensor_model_parallel", False)
            start = 0 if replicated else parameter.numel() * dist.get_rank()
            parameter.data.copy_(value[start : start + parameter.numel()])
        elif "linear" in name or "expert" in name:
            parameter.data *= 4  # large enough for the order of the modules to matter
    return model.to(config.params_dtype) if config.bf16 else model


def pair(ladder: str, multiplier: float = 1, **options: Any) -> tuple[GPTModel, GPTModel]:
    """The ladder model and the stock model, with the same weights."""
    torch.manual_seed(0)
    stock = build(None, **options)
    model = build(ladder, multiplier, **options)
    model.load_state_dict(stock.state_dict())
    return model, stock


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]
    return tokens, positions, mask


def recurrence(model: GPTModel, ladder: str, multiplier: float = 1) -> Tensor:
    """Logits [b, s, v] by form B of the ladder, out of a stock model's modules, whose outputs are
    multiplied before they are added."""
    tokens, positions, mask = inputs()
    fp32_residual = model.config.fp32_residual_connection
    rope = model.rotary_pos_emb(SEQUENCE)
    embedding = model.embedding(input_ids=tokens, position_ids=positions)
    prev = h = embedding
    for layer in model.decoder.layers:

        def added(output_with_bias: tuple[Tensor, Tensor | None], stream: Tensor) -> Tensor:
            output, bias = output_with_bias
            stream = stream.float() if fp32_residual else stream
            output = output.to(stream.dtype)
            output = output if bias is None else output + bias.to(stream.dtype)
            return stream + multiplier * output

        def attention(stream: Tensor, layer: Any = layer) -> tuple[Tensor, Tensor | None]:
            normed = layer.input_layernorm(stream)
            return layer.self_attention(normed, attention_mask=mask, rotary_pos_emb=rope)

        def mlp(stream: Tensor, layer: Any = layer) -> tuple[Tensor, Tensor | None]:
            return layer.mlp(layer.pre_mlp_layernorm(stream))

        if layer.layer_number - 1 in LadderResidual(ladder).resolve(LAYERS):
            after_attention = added(attention(prev), h)
            after_mlp = added(mlp(h), after_attention)
        else:
            after_attention = added(attention(h), h)
            after_mlp = added(mlp(after_attention), after_attention)
        prev, h = after_attention, after_mlp
    logits, _ = model.output_layer(model.decoder.final_layernorm(h))
    return logits.transpose(0, 1)


def backward(logits: Tensor) -> None:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits.float() * weights).sum().backward()


def gradients(model: GPTModel) -> dict[str, Tensor]:
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def difference(A: dict[str, Tensor], B: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to the gradient's own largest value."""
    assert A.keys() == B.keys(), A.keys() ^ B.keys()
    return max(
        ((A[name] - B[name]).abs().max() / B[name].abs().max().clamp(min=1e-20)).item()
        for name in B
    )


def against_recurrence(
    ladder: str, options: dict[str, Any], multiplier: float = 1
) -> dict[str, Any]:
    known = {"pattern", *(field.name for field in dataclasses.fields(TransformerConfig))}
    if not options.keys() <= known:
        return {"unknown": sorted(options.keys() - known)}
    model, stock = pair(ladder, multiplier=multiplier, **options)
    A, B = model(*inputs()), recurrence(stock, ladder, multiplier)
    standard = stock(*inputs())
    backward(A)
    backward(B)
    return {
        "logits": (A - B).abs().max().item() / B.abs().max().item(),
        "gradients": difference(gradients(model), gradients(stock)),
        "from standard": (A - standard).abs().max().item() / B.abs().max().item(),
        "same keys": list(model.state_dict()) == list(stock.state_dict()),
        "same sharded keys": sorted(model.sharded_state_dict())
        == sorted(stock.sharded_state_dict()),
    }


def run(model: GPTModel, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one training step, dropout seeded."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(*inputs())
    backward(logits)
    return logits.detach(), gradients(model)


def dropout(**options: Any) -> dict[str, Any]:
    """With dropout, full recompute draws the same masks as no recompute."""
    options = {"hidden_dropout": 0.2, "attention_dropout": 0.1, **options}
    model, _ = pair("all", **options)
    recomputed = build("all", **options, **FULL)
    recomputed.load_state_dict(model.state_dict())
    (A, a), (B, b) = run(model), run(recomputed)
    still, _ = run(model.eval())
    return {
        "logits": (A - B).abs().max().item(),
        "gradients": difference(a, b),
        "drops": (A - still).abs().max().item(),
    }


def fused() -> dict[str, Any]:
    """The fused bias-dropout-add gives what the unfused one does."""
    unfused, _ = pair("1-3")
    model = build("1-3", bias_dropout_fusion=True)
    model.load_state_dict(unfused.state_dict())
    (A, a), (B, b) = run(model), run(unfused)
    return {"logits": (A - B).abs().max().item(), "gradients": difference(a, b)}


class Late:
    """A collective whose buffer holds NaN until it is waited for."""

    def __init__(self, buffer: Tensor, launch: Callable[[Tensor], Any]) -> None:
        self.buffer, self.value = buffer.data, buffer.clone()
        launch(self.value).wait()
        self.buffer.fill_(float("nan"))

    def wait(self) -> None:
        self.buffer.copy_(self.value)


@contextlib.contextmanager
def replaced(**names: Any) -> Iterator[None]:
    """Names of the reduction module replaced for a while."""
    before = {name: getattr(reduction, name) for name in names}
    vars(reduction).update(names)
    try:
        yield
    finally:
        vars(reduction).update(before)


class LateDist:
    """torch.distributed with late collectives."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, buffer: Tensor, group: Any = None, async_op: bool = False) -> Any:
        return Late(buffer, lambda value: dist.all_reduce(value, group=group, async_op=True))


def late_reduce_scatter(output: Tensor, source: Tensor, group: Any, async_op: bool) -> Any:
    return Late(output, lambda value: scatter(value, source, group=group, async_op=True))


def late_all_gather(output: Tensor, source: Tensor, group: Any, async_op: bool) -> Any:
    return Late(output, lambda value: gather(value, source, group=group, async_op=True))


scatter, gather = reduction._reduce_scatter, reduction._all_gather


def never_read_early(**options: Any) -> dict[str, Any]:
    """Results stay what they are when buffers hold NaN until the wait."""
    model, _ = pair("1-3", **options)
    A, a = run(model)
    late = {"_reduce_scatter": late_reduce_scatter, "_all_gather": late_all_gather}
    model(*inputs())  # a layer knows the one that follows it from its second forward on
    with replaced(dist=LateDist(), **late):
        B, b = run(model)
    return {"logits": (A - B).abs().max().item(), "gradients": difference(a, b)}


def order(ladder: str = "all", **options: Any) -> dict[str, Any]:
    """What happens in a forward and in its backward, in order."""
    model, _ = pair(ladder, **options)
    events, noted = notes(model)
    backward(model(*inputs()))  # from the second step on, a layer knows the one that follows it
    events.clear()
    with replaced(InFlight=noted):
        logits = model(*inputs())
        forward, events[:] = list(events), []
        backward(logits)
    return {"forward": forward, "backward": events}


def collectives(**options: Any) -> dict[str, Any]:
    """In a forward and backward: the ladder adds none, with recompute or without."""

    def count(model: GPTModel) -> dict[str, int]:
        backward(model(*inputs()))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            backward(model(*inputs()))
        return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))

    model, stock = pair("all", **options)
    return {"ladder": count(model), "standard": count(stock)}


def static_inference(**options: Any) -> dict[str, Any]:
    """Prefill and decode through a static context give the full forward's logits."""
    model, _ = pair("last:3", **options)
    model.eval()
    tokens, positions, mask = inputs()
    context = StaticInferenceContext(BATCH, SEQUENCE)
    gathered = {"runtime_gather_output": True}
    cached = {**gathered, "inference_context": context}
    with torch.no_grad():
        full = model(tokens, positions, mask, **gathered)
        parts = [model(tokens[:, :9], positions[:, :9], mask[..., :9, :9], **cached)]
        for step in range(9, SEQUENCE):
            context.sequence_len_offset = step
            last = slice(step, step + 1)
            parts.append(model(tokens[:, last], positions[:, last], None, **cached))
    last = SEQUENCE - 8  # 0.17 gives the logits of a prompt's last token only
    return {"logits": (torch.cat(parts, dim=1)[:, -8:] - full[:, last:]).abs().max().item()}


def static_order() -> dict[str, Any]:
    """What happens in a prompt and in one token behind it, in order."""
    model, _ = pair("all")
    events, noted = notes(model.eval())
    tokens, positions, mask = inputs()
    context = StaticInferenceContext(BATCH, SEQUENCE)
    with torch.no_grad(), replaced(InFlight=noted):
        model(tokens[:, :9], positions[:, :9], mask[..., :9, :9], inference_context=context)
        prefill, events[:] = list(events), []
        context.sequence_len_offset = 9
        model(tokens[:, 9:10], positions[:, 9:10], None, inference_context=context)
    return {"prefill": prefill, "decode": events}


def start(minutes: float = 30, tensor_parallel_size: int | None = None) -> None:
    """Bring Megatron up; a collective may take that long."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    # Without TransformerEngine the default, fp8=False, still asks for its fp8 state.
    tensor_parallel.CheckpointWithoutOutput = functools.partial(
        tensor_parallel.CheckpointWithoutOutput, fp8=None
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size or dist.get_world_size(),
        distributed_timeout_minutes=minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def write(output: str, cases: dict[str, Callable[[], dict[str, Any]]], leave: bool = True) -> None:
    """Run the cases; a JSON line for each, from rank 0, and leave Megatron."""
    for name, case in cases.items():
        result = case()
        if dist.get_rank() == 0:
            with Path(output).open("a") as lines:
                lines.write(json.dumps({"case": name, **result}) + "\n")
    if leave:
        dist.destroy_process_group()


def main(output: str) -> None:
    start()
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(against_recurrence, *case)
        for name, case in AGAINST_RECURRENCE.items()
    }
    cases |= {
        "dropout": dropout,
        "dropout-sequence-parallel": lambda: dropout(**SP),
        "fused": fused,
        "late": never_read_early,
        "late-sequence-parallel": lambda: never_read_early(**SP),
        "late-recompute": lambda: never_read_early(**FULL),
        "order": order,
        "order-partial": lambda: order("2-3"),
        "order-sequence-parallel": lambda: order(**SP),
        "order-recompute-norm": lambda: order(**SP, **RECOMPUTED_NORM),
        "collectives": collectives,
        "collectives-recompute": lambda: collectives(**FULL),
        "collectives-sequence-parallel": lambda: collectives(**SP),
        "collectives-recompute-sequence-parallel": lambda: collectives(**SP, **FULL),
        "static-order": static_order,
        "static-inference": static_inference,
        "static-inference-llama": lambda: static_inference(**LLAMA),
    }
    write(output, cases)


if __name__ == "__main__":
    main(sys.argv[1])
