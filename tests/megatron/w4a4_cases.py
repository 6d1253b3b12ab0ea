"""Models of real Megatron layers with W4A4 against a naive one, in two processes.

Each of the gloo processes runs every case below; rank 0 writes one JSON line a case.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_plugins import cpu

cpu.install()
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.megatron import dense_moe_cases, ladder_cases
from tests.megatron.dense_moe_cases import Full, axis_of, batches, gpt, gradients, local
from tests.megatron.w4a4_naive import Naive, integers, learned
from tests.megatron.w4a4_table import BF16, GPT, RECOMPUTE, SP, STEPS, TOKENS, WORLD
from torch_plugins.config import W4A4, CrossLayerAttention, LadderResidual
from torch_plugins.w4a4.quantizer import Mode, quantizers_of, set_mode


def build(settings: dict[str, Any], **options: Any) -> tuple[GPTModel, Full]:
    """A GPT with W4A4 and, by name, the whole of its random weights."""
    over_experts(options.get("expert_model_parallel_size", 1))
    features: dict[str, Any] = {"w4a4": W4A4(**settings)}
    if (ladder := options.pop("ladder", None)) is not None:
        features = {"ladder_residual": LadderResidual(ladder), **features}
    if (sharing := options.pop("sharing", None)) is not None:
        features = {"cross_layer_attention": CrossLayerAttention(sharing), **features}
    gated = {"gated_linear_unit": True, "ffn_hidden_size": 64, "num_query_groups": 2}
    options = {**GPT, **gated, **options}
    options["activation_func"] = F.silu if options["gated_linear_unit"] else F.gelu
    config = TransformerConfig(**options)
    config.megatron_plugins = features
    config.hetereogenous_dist_checkpoint = "cross_layer_attention" in features
    moe = config.num_moe_experts
    spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    if moe:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm"
        )
    model = gpt(config, spec)
    full, generator = {}, torch.Generator().manual_seed(7)
    for name in global_names(model):
        parameter = dict(model.named_parameters()).get(local_name(model, name))
        like = next(p for n, p in model.named_parameters() if kind(n) == kind(name))
        shape = list(like.shape)
        if (axis := axis_of(like)) is not None and not whole_expert(name):
            shape[axis] *= WORLD
        value = random_value(name, shape, generator)
        full[name] = value
        if parameter is not None:
            parameter.data.copy_(
                value if whole_expert(name) else local(config, name, parameter, value)
            )
    return (model.to(config.params_dtype) if config.bf16 else model), full


def over_experts(processes: int) -> None:
    """Divide the processes anew; an expert is whole in one."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=WORLD,
        expert_model_parallel_size=processes,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def random_value(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator)
    if "clip" in name:
        return 2.5 * (1 + 0.1 * drawn) * (-1 if name.endswith("low") else 1)
    if len(shape) == 1:
        return drawn * 0.3 + (0 if name.endswith("bias") else 1)
    return drawn * 0.25


def whole_expert(name: str) -> bool:
    return "local_experts" in name


def kind(name: str) -> str:
    """A name without the number of its expert."""
    head, mark, tail = name.partition("local_experts.")
    return head + mark + tail.partition(".")[2] if mark else name


def experts_here(model: GPTModel) -> int:
    return (model.config.num_moe_experts or 0) // model.config.expert_model_parallel_size


def first_expert(model: GPTModel) -> int:
    apart = model.config.expert_model_parallel_size > 1
    return dist.get_rank() * experts_here(model) if apart else 0


def global_names(model: GPTModel) -> list[str]:
    """Parameters of the whole model, in an order that is the same in all processes."""
    names = []
    for name, _ in model.named_parameters():
        head, mark, tail = name.partition("local_experts.")
        number, dot, rest = tail.partition(".")
        if not mark:
            names.append(name)
        elif number == "0":
            total = range(model.config.num_moe_experts or 0)
            names += [f"{head}{mark}{expert}{dot}{rest}" for expert in total]
    return names


def local_name(model: GPTModel, name: str) -> str:
    """What this process calls a parameter, be it here or not."""
    head, mark, tail = name.partition("local_experts.")
    if not mark:
        return name
    number, dot, rest = tail.partition(".")
    here = int(number) - first_expert(model)
    return f"{head}{mark}{here}{dot}{rest}" if 0 <= here < experts_here(model) else "elsewhere"


def step(model: GPTModel) -> list[float]:
    """Two micro-batches, and what Megatron does to gradients once per step."""
    losses = dense_moe_cases.step(model)
    for name, parameter in model.named_parameters():
        shared: Any = parameter
        if parameter.grad is None:
            continue
        if getattr(shared, "average_gradients_across_tp_domain", False):
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD
        if whole_expert(name) and model.config.expert_model_parallel_size == 1:
            dist.all_reduce(parameter.grad)
    return losses


def naive_step(
    model: GPTModel, full: Full, settings: dict[str, Any], ladder: Any, sharing: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and this process's gradients of the same step, penalties added up by hand."""
    weights = {name: value.clone().requires_grad_() for name, value in full.items()}
    feature, config, losses = W4A4(**settings), model.config, []
    for tokens, labels in batches(2):
        naive = Naive(weights, feature, config)
        logits = naive.logits(tokens, ladder, sharing)
        main = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        losses.append(main.item())
        mean = main + feature.kurtosis_weight * sum(naive.penalties)
        weight = tokens.numel() if config.calculate_per_token_loss else 1 / 2
        (mean * weight * dense_moe_cases.LOSS_SCALE).backward()
    parameters, found = dict(model.named_parameters()), {}
    for name, value in weights.items():
        here = local_name(model, name)
        if value.grad is not None and here in parameters:
            part = (
                value.grad
                if whole_expert(name)
                else local(config, name, parameters[here], value.grad)
            )
            found[here] = part
    return losses, found


def against_naive(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    ladder, sharing = options.get("ladder"), options.get("sharing")
    model, full = build(settings, **options)
    losses, found = step(model), gradients(model)
    expected_losses, expected = naive_step(model, full, settings, ladder, sharing)
    clips = {name for name in found if "clip" in name}
    unpenalized = {**settings, "kurtosis_weight": 0.0, "modules": settings.get("modules", "*")}
    if settings.get("activation_bits") == 0:
        unpenalized |= {"activation_bits": 4, "modules": "none"}
    without = naive_step(model, full, unpenalized, ladder, sharing)[1]
    rest, linears = (
        found.keys() - clips,
        {n for n in expected if n.endswith(("qkv.weight", "fc1.weight"))},
    )
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        "gradients": ladder_cases.difference(*(of(rest, x) for x in (found, expected))),
        "clips": of_largest(found, expected, clips),
        "clip count": len(clips),
        "from kurtosis": ladder_cases.difference(*(of(linears, x) for x in (without, expected))),
        "reduced like weights": all(
            clip.allreduce == linear.weight.allreduce
            for linear in model.modules()
            if getattr(linear, "input_quantizer", None) is not None
            for clip in linear.input_quantizer.parameters()
        ),
        "missing": sorted(expected.keys() ^ found.keys()),
        "sharded keys": sorted({shard.key for shard in model.sharded_state_dict().values()}),
    }


def of(names: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def of_largest(found: dict[str, Tensor], expected: dict[str, Tensor], names: set[str]) -> float:
    """Largest difference of the clips' gradients over the largest of them: each is a difference of
    large sums."""
    if not names:
        return 0.0
    most = max(expected[name].abs().max().item() for name in names)
    return max((found[name] - expected[name]).abs().max().item() for name in names) / most


def quantizers(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What each quantizer makes of its input, against the naive one on the whole of that input.

    A token's largest feature is half a step from two codes: models that differ in the last bit take
    it to either, so that only single quantizers can be compared.
    """
    model, _ = build(settings, **options)
    wrong, found = 0, 0
    bits = W4A4(**settings).activation_bits

    def compare(module: Any, args: tuple[Tensor], out: Tensor) -> None:
        nonlocal wrong, found
        whole, first = args[0], 0
        if module.reduce is not None:
            parts = [torch.empty_like(args[0]) for _ in range(WORLD)]
            dist.all_gather(parts, args[0].contiguous())
            whole, first = torch.cat(parts, -1), dist.get_rank() * args[0].shape[-1]
        expected = integers(whole, bits)[..., first : first + out.shape[-1]]
        wrong += int((out != expected).sum())
        found += out.numel()

    for quantizer in quantizers_of(model).values():
        quantizer.register_forward_hook(compare)
    step(model)
    grads = all(p.grad is not None for p in model.parameters())
    return {"wrong": wrong, "found": found, "gradients": grads}


def recomputed(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """How far gradients of each recomputation are from those of none, the penalties in."""
    model, _ = build(settings, **options)
    step(model)
    plain, found = gradients(model), {}
    for name, recompute in RECOMPUTE.items():
        model, _ = build(settings, **options, **recompute)
        step(model)
        found[name] = ladder_cases.difference(gradients(model), plain)
    return found


def modes() -> dict[str, Any]:
    """A model that does not quantize yet, and what its quantizers saw."""
    settings = dict(kurtosis_weight=0.0, clip_init="percentile:100")
    model, full = build(settings, **SP)
    plain = {**settings, "modules": "none"}
    expected = naive_step(model, full, plain, None, None)
    quantizers = quantizers_of(model)
    for quantizer in quantizers.values():
        for clip in quantizer.parameters():
            clip.data.zero_()
    set_mode(quantizers.values(), Mode.OBSERVE)
    losses = step(model)
    found = gradients(model)
    weights = {name: grad for name, grad in found.items() if "clip" not in name}
    clips = [grad.abs().max().item() for name, grad in found.items() if "clip" in name]
    seen = {name: q.observed for name, q in quantizers.items()}
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, expected[0], strict=True)),
        "gradients": ladder_cases.difference(weights, {n: expected[1][n] for n in weights}),
        "clips": [len(clips), max(clips)],
        "waiting": all(q.uncalibrated() for q in quantizers.values()),
        "observed": all(o is not None and bool(o[0] > o[1]) for o in seen.values()),
    }


def bf16() -> dict[str, Any]:
    """Half precision: each quantizer computes in fp32 on the half-precision input and clips."""
    model, _ = build(dict(clip_init="2.5", kurtosis_weight=0.02), **BF16, **SP)
    wrong, levels = 0, 0

    def compare(module: Any, args: tuple[Tensor], out: Tensor) -> None:
        nonlocal wrong, levels
        x, high, low = (each.detach().float() for each in (args[0], *module.clips()))
        wrong += int((out != learned(x, high, low, 4).to(out.dtype)).sum())
        levels = max(levels, len(out.detach().unique()))

    for quantizer in quantizers_of(model).values():
        quantizer.register_forward_hook(compare)
    losses = step(model)
    finite = all(bool(torch.isfinite(grad).all()) for grad in gradients(model).values())
    return {"wrong": wrong, "levels": levels, "finite": finite, "loss": losses[0]}


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"step {name}": functools.partial(against_naive, *case) for name, case in STEPS.items()
    }
    for name, case in TOKENS.items():
        found[f"quantizers {name}"] = functools.partial(quantizers, *case)
    found["recomputed"] = functools.partial(recomputed, *STEPS["learned"])
    found["recomputed sequence parallel"] = functools.partial(recomputed, *STEPS["token loss"])
    found["modes"] = modes
    found["bf16"] = bf16
    return found


def main(output: str) -> None:
    ladder_cases.start()
    ladder_cases.write(output, cases())


if __name__ == "__main__":
    main(sys.argv[1])
