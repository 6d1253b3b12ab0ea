"""One training of the comparison by Megatron, in this process, and its losses on held-out text.

The model comes from a command line as in any launcher; Megatron's ``train_step`` does each step.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_PLUGINS_CPU": "1"}
import torch
from arms import STOCK, WITH_EXPERTS, Rule, Run, Settings, flags
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, global_vars, training
from megatron.training.arguments import (
    core_transformer_config_from_args,
    parse_args,
    validate_args,
)
from torch import Tensor

from torch_plugins.dense_moe import keep, utilization


def read_tokens(path: Path) -> Tensor:
    """The tokens of a ``.bin`` of Megatron's indexed format: bare ids of 16 bits."""
    size = path.stat().st_size // 2
    return torch.from_file(str(path), size=size, dtype=torch.uint16).long()


def start_worker() -> None:
    """One process, one thread, and all of Megatron's groups."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


@contextlib.contextmanager
def megatron(words: list[str]) -> Iterator[tuple[Any, Any, Any]]:
    """Megatron's model (wrapped for data parallelism), optimizer and scheduler for a command
    line."""
    with contextlib.redirect_stdout(io.StringIO()):
        before, sys.argv = sys.argv, ["compare", *words]
        args = parse_args()
        sys.argv = before
        validate_args(args)
        args.padded_vocab_size = args.vocab_size + 1
        global_vars.set_global_variables(args, build_tokenizer=False)
        torch.manual_seed(args.seed)
        model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
        [chunk], optimizer, scheduler = training.setup_model_and_optimizer(
            model_provider_func=model_provider, model_type=ModelType.encoder_or_decoder
        )
    yield chunk, optimizer, scheduler
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()


def model_provider(*unused: Any, **options: Any) -> GPTModel:
    args = global_vars.get_args()
    config = core_transformer_config_from_args(args)
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def batches(settings: Settings, tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Random places of the text, ``[b, s + 1]``: those of a seed are one for all arms."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(settings.sequence_length + 1)
    while True:
        last = len(tokens) - settings.sequence_length
        starts = torch.randint(last, (settings.batch_size, 1), generator=generator)
        yield tokens[starts + span]


def forward(batch: Tensor, model: Any) -> Tensor:
    """Losses of all tokens, ``[b, s]``."""
    sequences, length = batch.shape[0], batch.shape[1] - 1
    positions = torch.arange(length).expand(sequences, length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    losses: Tensor = model(batch[:, :-1], positions, future, labels=batch[:, 1:])
    return losses


def forward_step(data: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    return forward(next(data), model), loss_of


def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum, count, and what the log would show."""
    total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def train(
    settings: Settings, run: Run, data: Path, rules: list[Rule], save: Path | None = None
) -> dict[str, Any]:
    """Train, and measure under every rule of inference; in a process of ``start_worker``.

    Returns:
        ``parameters`` (of the layers, and of these the MLP's), ``points`` (a loss for each rule,
        and the share of experts that it keeps), what the routers do, seconds of this process.
    """
    begun = time.process_time()
    train_tokens, held_out = (read_tokens(data / f"{name}.bin") for name in ("train", "valid"))
    with megatron(flags(settings, run, save)) as (chunk, optimizer, scheduler):
        config, feed = chunk.config, batches(settings, train_tokens, run.seed)
        chunk.train()
        for step in range(settings.steps):
            training.train_step(
                *(forward_step, feed, [chunk], optimizer, scheduler, config),
                get_forward_backward_func(),
                iteration=step,
            )
        if save is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                checkpointing.save_checkpoint(settings.steps, [chunk], optimizer, scheduler, 0)
        model = unwrap_model([chunk])[0].eval()
        points = [measure(settings, run.arm, model, held_out, rule) for rule in rules]
        found = {
            "parameters": parameters(model),
            "points": points,
            "routers": routers(settings, run.arm, model, held_out),
        }
    return {**found, "seconds": time.process_time() - begun}


def parameters(model: Any) -> dict[str, int]:
    """Of the layers: all, and the matrices of the MLPs without routers."""
    named = [(name, p.numel()) for name, p in model.decoder.named_parameters()]
    mlp = sum(size for name, size in named if ".mlp." in name and ".router." not in name)
    return {"layers": sum(size for _, size in named), "mlp": mlp}


def sequences(settings: Settings, tokens: Tensor) -> Tensor:
    """Spread evenly over the held-out text."""
    last = len(tokens) - settings.sequence_length - 1
    starts = torch.linspace(0, last, settings.validation_sequences).long().unsqueeze(1)
    return tokens[starts + torch.arange(settings.sequence_length + 1)]


@torch.no_grad()
def measure(settings: Settings, arm: str, model: Any, tokens: Tensor, rule: Rule) -> dict[str, Any]:
    """Nats per token under a rule, and the mean share of the MLP's experts that tokens keep."""
    name, value = rule
    found = [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
    share: list[float] = []
    hooks = []
    if arm in WITH_EXPERTS:
        kept = {"dense": None, "top-k": (int(value), None), "threshold": (None, value)}[name]
        for router in found:
            router.kept = kept  # what --dsmoe-inference sets
            if kept is not None:
                hooks.append(router.register_forward_hook(partial(_count, kept, share)))
    elif arm == STOCK:
        for router in found:
            router.topk = int(value)  # what --moe-router-topk sets
        share.append(value / settings.experts)
    losses = [
        forward(b, model).mean() for b in sequences(settings, tokens).split(settings.batch_size)
    ]
    for hook in hooks:
        hook.remove()
    mean_share = sum(share) / len(share) if share else 1.0
    loss = float(sum(losses) / len(losses))
    return {"rule": name, "value": value, "share": mean_share, "loss": loss}


def _count(
    kept: tuple[int | None, float | None],
    into: list[float],
    router: Any,
    inputs: Any,
    scores: Tensor,
) -> None:
    into.append(keep(scores.flatten(0, -2), *kept).float().mean().item())


@torch.no_grad()
def routers(settings: Settings, arm: str, model: Any, tokens: Tensor) -> list[dict[str, float]]:
    """By layer, over the held-out text: mutual information, entropy, share above 0.48 / N."""
    if arm not in WITH_EXPERTS:
        return []
    measured = []
    for layer in model.decoder.layers:
        layer.mlp.router.kept = None
    seen: list[list[Tensor]] = [[] for _ in model.decoder.layers]
    hooks = [
        layer.mlp.router.register_forward_hook(lambda m, i, out, own=own: own.append(out))
        for layer, own in zip(model.decoder.layers, seen, strict=True)
    ]
    for batch in sequences(settings, tokens).split(settings.batch_size):
        forward(batch, model)
    for hook in hooks:
        hook.remove()
    for own in seen:
        scores = torch.cat([part.flatten(0, -2) for part in own])
        found = utilization(scores.clamp_min(torch.finfo(scores.dtype).tiny).log())
        measured.append(
            {
                "mutual_information": found.mutual_information.item(),
                "conditional_entropy": found.conditional_entropy.item(),
                "active": found.active_N.mean().item(),
                "largest": found.share_N.max().item() * settings.experts,
            }
        )
    return measured
