"""Ladder models in fp64, by several tensor-parallel processes, against one process.

    ladder_exact.py FOLDER

One process writes its weights, logits and gradients into FOLDER; more of them take the weights from
there, and rank 0 writes one JSON line for each of their cases: the largest difference of the logits
and of any gradient, relative to its own largest value, and whether hiding the collectives of the
column-parallel linears changes a bit.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.megatron.ladder_cases import BATCH, FULL, LLAMA, SEQUENCE, SP, VOCAB, build, start

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("all", {}),
    "llama": ("last:3", LLAMA),
    "partial": ("1-2", {}),
    "recompute": ("all", FULL),
    "two-microbatches": ("all", {}),
    "frozen": ("all", {}),
}
CASES = KINDS | {f"{name}-sequence-parallel": (of, {**o, **SP}) for name, (of, o) in KINDS.items()}
FROZEN = ("embedding.", "decoder.layers.0.", "decoder.layers.2.self_attention.linear_qkv")
"""Of the frozen models: no gradient reaches the first layer, and one passes a frozen linear."""
SCALE = 2.0
"""Of linears' weights, for the order of the modules to matter."""


def make(case: str) -> Any:
    ladder, options = CASES[case]
    options = {
        **options,
        "num_query_groups": 4,
        "tensor_model_parallel_size": dist.get_world_size(),
    }
    if dist.get_world_size() == 1:
        options.pop("sequence_parallel", None)
    model = build(ladder, **options).double()
    for name, parameter in model.named_parameters():
        frozen = case.startswith("frozen") and name.startswith(FROZEN)
        parameter.requires_grad_(not frozen)
    return model


def shard(full: Tensor, name: str, parameter: Tensor, gated: bool) -> Tensor:
    """This rank's part of a whole weight or gradient."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim = parameter.partition_dim
    if gated and "linear_fc1" in name:  # the gate and the other half are cut apart
        return torch.cat([half.chunk(size, dim)[rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(size, dim)[rank]


def tokens(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]
    return torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=draw), positions, mask


def step(model: Any, microbatches: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the last microbatch, and gradients; all forwards, then all backwards."""
    size, rank = dist.get_world_size(), dist.get_rank()
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(BATCH, SEQUENCE, VOCAB, generator=draw, dtype=torch.float64)
    model.zero_grad()
    outputs = [model(*tokens(seed)) for seed in range(microbatches)]
    for output in outputs:
        (output * weights.chunk(size, -1)[rank]).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):  # summed by Megatron once per step
                dist.all_reduce(gradients[name])
    return outputs[-1].detach(), gradients


@contextlib.contextmanager
def nothing_hidden() -> Iterator[None]:
    with patch("megatron_plugins.ladder_residual.overlap.prepare", return_value={}):
        yield


def interrupt(model: Any) -> None:
    """Forwards that end in the middle of a module, with the next one begun; in evaluation, where
    full recompute does not keep the next layer's from beginning."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for layer, name in ((1, "linear_proj"), (2, "linear_fc2")):
        module = dict(model.decoder.layers[layer].named_modules())
        (found,) = (value for key, value in module.items() if key.endswith(name))
        handle = found.register_forward_pre_hook(stop)
        with contextlib.suppress(KeyboardInterrupt):
            model.eval()(*tokens(99))
        handle.remove()
    model.train()


def count(case: str) -> int:
    return 2 if case.startswith("two-microbatches") else 1


def write_reference(folder: Path) -> None:
    for case in CASES:
        model = make(case)
        generator = torch.Generator().manual_seed(11)
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.1 * noise
            parameter.data *= SCALE if parameter.dim() == 2 else 1
        weights = {f"weight.{name}": value.data for name, value in model.named_parameters()}
        logits, gradients = step(model, count(case))
        named = {f"gradient.{name}": value for name, value in gradients.items()}
        save_file({"logits": logits, **weights, **named}, folder / f"{case}.safetensors")


def compare(case: str, folder: Path) -> dict[str, Any]:
    whole = load_file(folder / f"{case}.safetensors")
    results = []
    for hidden in (True, False):
        with contextlib.nullcontext() if hidden else nothing_hidden():
            model = make(case)
        gated = model.config.gated_linear_unit
        for name, parameter in model.named_parameters():
            parameter.data.copy_(shard(whole[f"weight.{name}"], name, parameter, gated))
        step(model, 1)  # from the second on, a layer knows the one that follows it
        interrupt(model)
        results.append(step(model, count(case)))
    (logits, gradients), (plain_logits, plain) = results
    parameters = dict(model.named_parameters())
    wanted = {
        name: shard(whole[f"gradient.{name}"], name, parameters[name], gated) for name in gradients
    }
    size, rank = dist.get_world_size(), dist.get_rank()
    off = [
        (gradients[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        for name, value in wanted.items()
    ]
    part = whole["logits"].chunk(size, -1)[rank]
    off.append((logits - part).abs().max() / part.abs().max())
    worst = torch.stack(off).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    same = torch.equal(logits, plain_logits) and gradients.keys() == plain.keys()
    same = same and all(torch.equal(value, plain[name]) for name, value in gradients.items())
    alike = torch.tensor(float(same))
    dist.all_reduce(alike, op=dist.ReduceOp.MIN)
    missing = sum(key.startswith("gradient.") for key in whole) - len(gradients)
    return {"worst": worst.item(), "bitwise": bool(alike), "missing": missing}


def main(folder: Path) -> None:
    start()
    if dist.get_world_size() == 1:
        write_reference(folder)
    else:
        for case in CASES:
            result = compare(case, folder)
            if dist.get_rank() == 0:
                with (folder / f"tp{dist.get_world_size()}.jsonl").open("a") as lines:
                    lines.write(json.dumps({"case": case, **result}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
