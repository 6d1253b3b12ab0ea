"""Converted models that AutoTP has sharded over two ranks, against one process without it.

Started by test_tensor_parallel.py; writes what happened to the JSON file given, and leaves
checkpoints in the folder given.

The link is slow here: an asynchronous all-reduce leaves NaN in its buffer and delivers at its wait,
so that a sum which is read before it was waited for, or never waited for, shows.
"""

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from conversion_cases import (
    GRANITE,
    LADDER,
    LLAMA,
    QWEN3,
    RATE,
    SIZES,
    batch,
    build,
    features_of,
    logits,
    settings,
    stock,
)
from deepspeed.utils import safe_get_full_grad
from engines import leave
from trainer_cases import trainer
from transformers import LlamaConfig

from deepspeed_plugins.tensor_parallel import OverlappedLayer
from torch_plugins.hf.convert import convert

BIASED = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
PARTIAL = {"ladder_residual": {"layers": "1,3"}}
SHARED = {"cross_layer_attention": {"sharing_factor": 2, "kv_norm": "separate"}}
CASES = {
    "biases": (0, BIASED, LADDER, None),
    "shared": (1, QWEN3, LADDER | SHARED, {"use_reentrant": True}),
    "partial, tied": (2, GRANITE, PARTIAL, {"use_reentrant": False}),
    "no ladder": (1, LLAMA, SHARED, None),
    "all cut": (3, BIASED, LADDER, None),
}
"""ZeRO stage, model, section and gradient checkpointing."""
STEPS = 2

events = []
"""What the collectives and modules of this rank did, in order."""


class Late:
    """An all-reduce whose sum arrives when it is waited for."""

    def __init__(self, work, buffer, total):
        self.work, self.buffer, self.total = work, buffer, total

    def wait(self):
        self.work.wait()
        self.buffer.data.copy_(self.total)  # as a link does: autograd does not see it
        events.append(("arrived", self.buffer.data_ptr()))


def slow(all_reduce):
    def launch(tensor, *args, async_op=False, **kwargs):
        events.append(("async" if async_op else "sync", tensor.data_ptr()))
        if not async_op:
            return all_reduce(tensor, *args, **kwargs)
        total = tensor.clone()
        tensor.fill_(float("nan"))
        return Late(all_reduce(total, *args, async_op=True, **kwargs), tensor, total)

    return launch


def plain(family, section):
    """Losses, gradients of the first step and hidden states after the last in one process."""
    model = stock(family)
    convert(model, features_of(section))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step, 0), labels=batch(step, 0)).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    states = model(batch(0, 0), output_hidden_states=True).hidden_states
    return losses, first, states


def mine(whole, shape):
    """This rank's part of a tensor that is cut to ``shape``, or whole."""
    for dim, size in enumerate(shape):
        if size != whole.shape[dim]:
            start = 0 if dist.get_rank() == 0 else whole.shape[dim] - size
            whole = whole.narrow(dim, start, size)
    return whole


def gradients_apart(engine, expected):
    """The largest difference over all parameters and ranks, relative to a tensor's largest."""
    worst = torch.zeros(())
    for name, parameter in engine.module.named_parameters():
        found, whole = safe_get_full_grad(parameter), expected[name]
        difference = (found - mine(whole, found.shape)).abs().max() / whole.abs().max()
        worst = torch.maximum(worst, difference)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def step(engine, number, context=None):
    """Loss; every rank of a tensor-parallel group has the same batch."""
    ids = batch(number, 0)
    with context or nullcontext():
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
    return loss.item()


def sharded(stage, family, section, checkpointing=None, seed=7):
    model = stock(family, seed)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    json_file = settings(stage, section, tensor_parallel={"autotp_size": 2})
    if not section:
        del json_file["deepspeed_plugins"]
    return build(stage, section, model, config=json_file)


def furthest(ones, others):
    """The largest difference of two lists of numbers or tensors, NaN if one is there."""
    pairs = zip(ones, others, strict=True)
    apart = [(torch.as_tensor(a) - torch.as_tensor(b)).abs().max() for a, b in pairs]
    return torch.stack(apart).max().item()


def offloaded():
    """Saves copies for the backward, made at once, as offloading does."""
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy)


def against_one_process(folder, stage, family, section, checkpointing):
    """Differences from the same training in one process."""
    losses, first, states = plain(family, section)
    engine = sharded(stage, family, section, checkpointing)
    found, seen = [], {}
    for number in range(STEPS):
        found.append(step(engine, number, checkpointing and number == 0 and offloaded()))
        if number == 0:
            seen["gradients"] = gradients_apart(engine, first)
        engine.step()
    overlapped = [m for m in engine.module.modules() if isinstance(m, OverlappedLayer)]
    seen["handed over"] = not any(layer._watched() for layer in overlapped)
    with torch.no_grad():
        hidden = engine(batch(0, 0), output_hidden_states=True).hidden_states
    seen["hidden states"] = furthest(hidden, states)
    engine.save_checkpoint(str(folder / f"stage-{stage}"))
    return seen | {"losses": furthest(found, losses)}


def order():
    """Events of one forward and the all-reduces of one step, with the ladder and without; whether a
    second engine on the model that overlaps already has the same loss."""
    counts = []
    for section in (None, LADDER):
        engine = sharded(1, LLAMA, section)
        step(engine, 0)  # with the comparison of the ranks' batches
        engine.step()
        names = {}
        for index, layer in enumerate(engine.module.model.layers):
            for part in ("self_attn", "mlp"):
                names[getattr(layer, part)] = f"{part} {index}"
                getattr(layer, part).register_forward_pre_hook(
                    lambda module, _, names=names: events.append(("start", names[module]))
                )
        events.clear()
        ids = batch(1, 0)
        loss = engine(ids, labels=ids).loss
        forward = list(events)
        engine.backward(loss)
        engine.step()
        counts.append(sum(kind in ("sync", "async") for kind, _ in events))
    expected = step(engine, 2)
    engine.destroy()
    json_file = settings(1, LADDER, tensor_parallel={"autotp_size": 2})
    second = build(1, LADDER, engine.module, config=json_file)
    return {"events": forward, "all-reduces": counts, "again": step(second, 2) == expected}


def saved(folder):
    """Whether a run that goes on from a checkpoint is the straight one; files for the export."""
    engine = sharded(1, QWEN3, LADDER | SHARED)
    step(engine, 0)
    engine.step()
    engine.save_checkpoint(str(folder / "cut"))
    gathered = engine._consolidated_16bit_state_dict()  # what Trainer.save_model saves
    if gathered:
        torch.save(gathered, folder / "gathered.pt")
    logits(engine, folder / "logits-cut.pt")
    other = sharded(1, QWEN3, LADDER | SHARED, seed=8)
    other.load_checkpoint(str(folder / "cut"))
    return {"resumed": step(other, 1) == step(engine, 1)}


def by_trainer(folder):
    """Loss on all data of a model that Trainer has trained and saved."""
    one = trainer(folder, 1, True, tensor_parallel={"autotp_size": 2})
    one.train()
    one.save_model(folder / "saved")
    return one.evaluate()["eval_loss"]


def main(record, folder):
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    dist.all_reduce = slow(dist.all_reduce)
    cases = {name: against_one_process(folder, *case) for name, case in CASES.items()}
    result = {"one process": cases, "order": order(), "saved": saved(folder)}
    result["trainer"] = by_trainer(folder / "trainer")
    if dist.get_rank() == 0:
        record.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
