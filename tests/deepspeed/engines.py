"""Tiny DeepSpeed engines on CPU and gloo, for scripts that ``harness.launch`` starts.

Importing this prepares the process: DeepSpeed would compile its shared-memory collectives, and a
process killed meanwhile leaves a lock behind at which every later one waits.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

WIDTH = 8


def start() -> None:
    """Bring DeepSpeed up on gloo.

    An engine of ZeRO 3 collects garbage, which takes 0.3 s with all the modules of torch: they are
    taken out first.
    """
    deepspeed.init_distributed("gloo")
    torch.optim.SGD([torch.zeros(1)])  # imports much at its first call
    gc.freeze()


def leave() -> None:
    """End together with the other processes: threads of gloo that are alive when Python ends can
    abort it."""
    dist.barrier()
    dist.destroy_process_group()


def config(stage: int = 0, micro_batches: int = 1, **sections: Any) -> dict[str, Any]:
    """A JSON: AdamW, fp32, two sequences a micro-batch and process, ZeRO of a stage."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **copy.deepcopy(sections),
    }


def model(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Biases at the JSON's rate, matrices at a quarter of it."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim == 1]
    return [{"params": matrices, "lr": 0.025}, {"params": biases, "lr": 0.1}]


def build(settings: dict[str, Any], seed: int = 7, **options: Any) -> Any:
    """An engine on a fresh model; ``options`` go to ``deepspeed.initialize``."""
    net = model(seed)
    if "optimizer" in settings:
        options.setdefault("model_parameters", groups(net))
    # DeepSpeed takes entries out of the JSON that it is given, such as "torch_adam".
    return deepspeed.initialize(model=net, config=copy.deepcopy(settings), **options)[0]


def rates(engine: Any) -> list[float]:
    """The learning rate of every group, as the next optimizer step will read it."""
    return [float(group["lr"]) for group in engine.optimizer.param_groups]


def train(engine: Any, step: int) -> None:
    """One optimizer step on data that depends on ``step``, rank and micro-batch."""
    rank = deepspeed.comm.get_rank()
    for part in range(engine.gradient_accumulation_steps()):
        generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
        x = torch.randn(2, WIDTH, generator=generator).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).pow(2).mean())
        engine.step()


def parameters(engine: Any) -> list[torch.Tensor]:
    """Copies of all parameters, whole on every rank."""
    every = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(every, enabled=hasattr(every[0], "ds_id")):
        return [parameter.detach().clone() for parameter in every]
