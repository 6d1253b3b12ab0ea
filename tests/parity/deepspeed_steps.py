"""The trainings of deepspeed_table.py, right and wrong, in DeepSpeed: two ranks, ZeRO 3, fp32.

    launch(DEEPSPEED_STEPS, folder, processes=2)

Reads ``batches.pt`` and each case's first weights, ``NAME.pt``, under Hugging Face names; leaves
``deepspeed.pt`` there with losses, gradient norms, rates, gradients of the first step and weights
after the second, the wrong trainings' too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests.deepspeed import engines
from tests.parity.deepspeed_table import (
    BATCH,
    CASES,
    EPSILON,
    RATE,
    SIZES,
    WEIGHT_DECAY,
    WRONG,
    Case,
)
from torch_plugins.config import DenseMoE, DesyncResidual
from torch_plugins.hf.convert import convert
from torch_plugins.mup import param_groups

MICRO_BATCHES = 2


def stock(case: Case, weights: dict[str, Tensor], poisoned: bool) -> nn.Module:
    """The family's own model with these weights; keys and values that Megatron has none of are NaN,
    or random, and are to be dropped."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.family, **SIZES, **case.fields)
    model = AutoModelForCausalLM.from_config(config)
    if "dense_moe" in case.section:  # the JSON finds the routers, with Megatron's weights
        convert(model, [DenseMoE.from_dict({**case.section["dense_moe"], "gated": True})])
    if "desync_residual" in case.section:  # the same of the norms of ranks
        convert(model, [DesyncResidual.from_dict(case.section["desync_residual"])])
    for name, parameter in model.state_dict().items():
        if name in weights:
            parameter.copy_(weights[name])
        else:
            assert ".self_attn.k_" in name or ".self_attn.v_" in name, name
            parameter.fill_(float("nan")) if poisoned else parameter.normal_(std=0.15)
    return model


def build(case: Case, model: nn.Module) -> Any:
    settings = engines.config(
        3,
        MICRO_BATCHES,
        train_micro_batch_size_per_gpu=1,
        gradient_clipping=1.0,
        optimizer={
            "type": "AdamW",
            "params": {"lr": RATE, "betas": [0.9, 0.95], "eps": EPSILON, "torch_adam": True},
        },
    )
    if case.section:
        settings["deepspeed_plugins"] = case.section
    if case.scheduler:
        settings["scheduler"] = {"type": "PowerLR", "params": dict(case.scheduler)}
    groups = param_groups(model, RATE, case.width_multiplier, WEIGHT_DECAY)
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]
    assert engine.train_batch_size() == BATCH
    return engine


def gradients(engine: Any) -> dict[str, Tensor]:
    """Whole and averaged over all micro-batches, before clipping."""
    return {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters()}


def weights_of(engine: Any) -> dict[str, Tensor]:
    names = (name for name, _ in engine.module.named_parameters())
    return dict(zip(names, engines.parameters(engine), strict=True))


def train(case: Case, weights: dict[str, Tensor], batches: Tensor, poisoned: bool) -> Any:
    """What both hosts record, by step, and the tensors."""
    engine = build(case, stock(case, weights, poisoned))
    seen: dict[str, Any] = {"loss": [], "norm": [], "rates": []}
    for step, tokens in enumerate(batches[: case.steps]):
        seen["rates"].append(sorted({*engines.rates(engine)}))
        own = tokens[dist.get_rank() :: dist.get_world_size()]  # in step with Megatron's
        total = torch.zeros(())
        for micro_batch, ids in enumerate(own.split(1)):
            # Megatron's loader gives no model the last token, whose scores routers would count.
            inputs, targets = ids[:, :-1], ids[:, 1:]
            loss = engine(inputs, labels=inputs, shift_labels=targets).loss
            engine.backward(loss)
            total += loss.detach() / MICRO_BATCHES / dist.get_world_size()
            if step == 0 and micro_batch == MICRO_BATCHES - 1:
                seen["gradients"] = gradients(engine)
            engine.step()
        dist.all_reduce(total)
        seen["loss"].append(total.item())
        seen["norm"].append(float(engine.get_global_grad_norm()))
        if step == 1:
            seen["weights"] = weights_of(engine)
    return seen


def main(folder: Path) -> None:
    engines.start()
    batches = torch.load(folder / "batches.pt")
    weights = {name: torch.load(folder / f"{name}.pt") for name in CASES}
    found = {name: train(case, weights[name], batches, True) for name, case in CASES.items()}
    for name, (of, _, case) in WRONG.items():
        found[name] = train(case, weights[of], batches[:2], False)
    if dist.get_rank() == 0:
        torch.save(found, folder / "deepspeed.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
