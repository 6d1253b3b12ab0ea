"""One training: a Llama, the plugin's linear layers, and a loop as a host would write it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiment_arms import PLANTED, Run, Settings, feature_of, sequences
from experiment_measure import outliers, perplexities, weights_of
from torch import Tensor, nn

from torch_plugins.auxiliary_loss import Scope, bind
from torch_plugins.config import W4A4
from torch_plugins.w4a4.linear import swap
from torch_plugins.w4a4.quantizer import Mode, mode_at, quantizers_of, set_mode


def build(settings: Settings) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.ffn_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.sequence_length,
            initializer_range=settings.init_std,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


@torch.no_grad()
def plant(settings: Settings, model: Any) -> None:
    """Let a few channels of the residual stream start larger, in everything that writes it."""
    step = settings.hidden_size // (settings.planted_channels + 1)
    channels = [step * (n + 1) for n in range(settings.planted_channels)]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[channels] *= settings.planted_factor
        layer.mlp.down_proj.weight[channels] *= settings.planted_factor


def schedule(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to a tenth."""
    warmup = max(1, settings.steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW; norms and clips have no weight decay, which would pull clips to 0."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.95))


class Quantization:
    """What a host does for the plugin's layers around each step."""

    def __init__(self, model: nn.Module, feature: W4A4 | None) -> None:
        self.model, self.feature, self.scope = model, feature, Scope()
        if feature is not None:
            swap(model, feature)
            bind(model, self.scope)
            self.scope.scale = 1.0  # one micro-batch, no loss scale
        self.quantizers = list(quantizers_of(model).values())
        set_mode(self.quantizers, Mode.OFF)

    def before(self, step: int) -> None:
        if self.feature is not None:
            waiting = any(quantizer.uncalibrated() for quantizer in self.quantizers)
            set_mode(self.quantizers, mode_at(self.feature, step, waiting))

    def after(self) -> None:
        """Clips start where the first step saw them."""
        for quantizer in self.quantizers:
            if quantizer.observed is not None:
                for name, value in quantizer.calibrate(*quantizer.observed).items():
                    quantizer.get_parameter(name).data.copy_(value)
        if self.feature is not None:
            self.scope.check()


def fit(
    settings: Settings,
    run: Run,
    model: Any,
    tokens: Tensor,
    probe: Callable[[int], None],
    tell: Callable[[str], None],
) -> None:
    """Train on random places of ``tokens``: those of a seed are one for all arms."""
    quantization = Quantization(model, feature_of(settings, run))
    optimizer = optimizer_of(model, settings.rate)
    probed = {round(share * settings.steps) for share in settings.probes}
    span = torch.arange(settings.sequence_length)
    generator = torch.Generator().manual_seed(run.seed)
    for step in range(settings.steps):
        if step in probed:
            probe(step)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * schedule(step, settings)
        last = len(tokens) - settings.sequence_length
        ids = tokens[torch.randint(last, (settings.batch_size, 1), generator=generator) + span]
        quantization.before(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        quantization.after()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, settings.steps // 6) == 0:
            tell(f"{run}: step {step} of {settings.steps}, loss {loss.item():.3f}")
    probe(settings.steps)


def train(
    settings: Settings,
    run: Run,
    data: dict[str, Tensor],
    tell: Callable[[str], None],
    save: Path | None = None,
) -> dict[str, Any]:
    """Train on one thread, and quantize in every way.

    Args:
        save: folder for the trained model, with its clips.

    Returns:
        ``probes`` (outliers by step and linear layer), ``weights`` (kurtosis and error of four-bit
        weights by linear layer), ``perplexities``, seconds of this process.
    """
    begun = time.process_time()
    torch.manual_seed(run.seed)
    model = build(settings)
    if run.variant == PLANTED:
        plant(settings, model)
    seen = sequences(settings, data["valid"], settings.probe_sequences)
    probes: list[dict[str, Any]] = []
    fit(
        settings,
        run,
        model,
        data["train"],
        lambda step: probes.append({"step": step, "layers": outliers(model, seen)}),
        tell,
    )
    if save is not None:
        model.save_pretrained(save)
    return {
        "probes": probes,
        "weights": weights_of(model),
        **perplexities(settings, lambda: build(settings), model, data),
        "seconds": time.process_time() - begun,
    }
