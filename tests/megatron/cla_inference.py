"""Dynamic inference of models that share keys and values, in Megatron's own context and engines.

Each of the gloo processes runs the cases of cla_cases.py, then those below; rank 0 writes one JSON
line a case. Everything of Megatron is the real one; only the attention kernel, flash-attn on a GPU,
is written out over the same paged caches, and pinned memory is left out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_plugins import cpu

cpu.install()

from megatron.core.inference import utils
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext, dynamic_context
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention, dot_product_attention

from tests.megatron import cla_cases, ladder_cases
from tests.megatron.cla_cases import build
from tests.megatron.cla_table import AGAINST_RECURRENCE, DYNAMIC_INFERENCE
from tests.megatron.ladder_cases import inputs
from tests.megatron.ladder_table import BATCH, SEQUENCE
from torch_plugins.config import ConfigError, CrossLayerAttention

BLOCK = 8


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    max_query_length: Any,
    max_key_length: Any,
    query_starts: Tensor,
    key_starts: Tensor,
    key_lengths: Tensor,
    block_table: Tensor,
    decode_only: bool,
    softmax_offset: Any = None,
) -> Tensor:
    """``[tokens, 1, heads, size]`` over caches ``[blocks, BLOCK, key-value heads, size]``."""
    query = query.squeeze(1)
    out = torch.zeros_like(query)
    starts = list(range(len(key_lengths) + 1)) if decode_only else query_starts.tolist()
    for request, length in enumerate(key_lengths.tolist()):
        tokens = slice(starts[request], starts[request + 1])
        count = tokens.stop - tokens.start
        if count <= 0 or length == 0:
            continue
        blocks = block_table[request].long().clamp(min=0)
        keys, values = (cache[blocks].flatten(0, 1)[:length] for cache in (key, value))
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[tokens], keys) * query.shape[-1] ** -0.5
        future = torch.arange(length)[None] > torch.arange(length - count, length)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("hqk,khd->qhd", weights, values)
    return out.unsqueeze(1)


def stand_in() -> dict[str, Any]:
    """For what only a GPU has: a kernel, and pinned memory."""
    attention.HAVE_FA3 = True
    attention.Attention.flash_decode_and_prefill = paged_attention
    dynamic_context.triton_append_key_value_cache = None

    def unpinned(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Tensor:
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return make

    for name in ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    return {}


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """What an engine does around its steps since 0.18."""
    mode = getattr(utils, "InferenceMode", None)
    with mode.active() if mode else contextlib.nullcontext():
        yield


def context_for(model: Any, **options: Any) -> Any:
    config = InferenceConfig(
        max_sequence_length=2 * SEQUENCE,
        buffer_size_gb=1 / 1024,
        max_requests=4,
        block_size_tokens=BLOCK,
        max_tokens=64,
        unified_memory_level=0,
        **options,
    )
    context = dynamic_context.DynamicInferenceContext(
        model_config=model.config, inference_config=config
    )
    if hasattr(context, "initialize_all_tensors"):
        context.initialize_all_tensors()
    return context


def decode(
    feature: CrossLayerAttention | None, ladder: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Two prompts, then token by token; the last logits of each step against the full forward."""
    model = build(feature, ladder, **options).eval()
    context = context_for(model)
    tokens, positions, mask = inputs()
    differences = []
    with torch.no_grad(), inference():
        full = model(tokens, positions, mask, runtime_gather_output=True)
        for request in range(BATCH):
            prompt = DynamicInferenceRequest(
                request_id=request,
                prompt_tokens=tokens[request, :9],
                sampling_params=SamplingParams(num_tokens_to_generate=8),
            )
            context.add_request(prompt)
        for step in range(9, SEQUENCE + 1):
            context.initialize_attention_state()
            ids, places = context.current_input_and_position_ids()
            logits = model(ids, places, None, inference_context=context, runtime_gather_output=True)
            difference = logits[0, :BATCH] - full[:, step - 1]
            differences.append(difference.abs().max().item() / full.abs().max().item())
            if step < SEQUENCE:
                active = torch.ones(BATCH, dtype=torch.int32)
                context.update_requests(active, tokens[:, step].clone())
    blocks = context.memory_buffer.shape[2]
    return {
        "logits": max(differences),
        "steps": len(differences),
        "blocks": blocks,
        "bytes per token": context.memory_buffer.nbytes / (blocks * BLOCK),
        "block bytes": context.block_size_bytes,
    }


def fused_rope() -> dict[str, Any]:
    model = build(CrossLayerAttention(2), None).eval()
    try:
        context_for(model, use_flashinfer_fused_rope=True)
    except ConfigError as error:
        return {"error": str(error)}
    return {"error": ""}


def fallback(feature: CrossLayerAttention | None) -> dict[str, Any]:
    """What the static engine does here, where no dynamic engine can run."""
    model = build(feature, None).eval()
    wrapper = GPTInferenceWrapper(model, StaticInferenceContext(BATCH, SEQUENCE))
    controller = TextGenerationController(wrapper, tokenizer=None)
    with warnings.catch_warnings(record=True) as caught, inference():
        warnings.simplefilter("always")
        try:
            StaticInferenceEngine(controller, buffer_size_gb=None)  # which no engine can use
        except Exception as error:
            return {"raised": str(error), "warned": ""}
    told = [str(w.message) for w in caught if "dynamic engine" in str(w.message)]
    return {"raised": "", "warned": told[0] if told else ""}


def packed() -> dict[str, Any]:
    """Two sequences packed into one, against each alone. Megatron's local core attention takes no
    packed sequences; written out, it does."""
    feature, _, options = AGAINST_RECURRENCE["one-group"]
    model = build(feature, None, **options)
    tokens, positions, mask = inputs()
    ends = [0, 10, SEQUENCE]
    starts = torch.tensor(ends, dtype=torch.int32)

    def core_attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        parts = []
        for first, end in itertools.pairwise(ends):
            scores = torch.einsum(
                "qhd,khd->hqk",
                *(
                    x[first:end].repeat_interleave(query.shape[1] // x.shape[1], 1)
                    for x in (query, key)
                ),
            )
            scores = scores * query.shape[-1] ** -0.5
            length = end - first
            weights = scores.masked_fill(mask[0, 0, :length, :length], float("-inf")).softmax(-1)
            values = value[first:end].repeat_interleave(query.shape[1] // value.shape[1], 1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
        return torch.cat(parts)

    one = [
        model(
            tokens[:1, first:end],
            positions[:1, : end - first],
            mask[..., : end - first, : end - first],
        )
        for first, end in itertools.pairwise(ends)
    ]
    expected = torch.cat(one, dim=1)
    places = torch.cat([torch.arange(end - first) for first, end in itertools.pairwise(ends)])
    lengths = dict(max_seqlen_q=10, max_seqlen_kv=10, cu_seqlens_q=starts, cu_seqlens_kv=starts)
    upstream = dot_product_attention.DotProductAttention.forward
    dot_product_attention.DotProductAttention.forward = core_attention
    found = model(
        tokens[:1], places[None], None, packed_seq_params=PackedSeqParams("thd", **lengths)
    )
    dot_product_attention.DotProductAttention.forward = upstream
    return {"logits": (found - expected).abs().max().item() / expected.abs().max().item()}


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"dynamic inference {name}": functools.partial(decode, *AGAINST_RECURRENCE[name])
        for name in DYNAMIC_INFERENCE
    }
    found["dynamic inference standard"] = lambda: decode(None, None, {})
    found["packed"] = packed
    found["fused rope"] = fused_rope
    found["fallback"] = lambda: fallback(CrossLayerAttention(2))
    found["standard fallback"] = lambda: fallback(None)
    return found


def main(output: str) -> None:
    ladder_cases.start()
    ladder_cases.write(output, {**cla_cases.cases(), "stand-ins": stand_in, **cases()})


if __name__ == "__main__":
    main(sys.argv[1])
