"""Auxiliary losses in real engines on two ranks, against plain torch with the sum of the losses.

Started by test_auxiliary_loss.py; writes what happened to the JSON file given.
"""

import copy
import csv
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from auxiliary_net import (
    COEFFICIENTS,
    RATE,
    STEPS,
    Block,
    Head,
    Lost,
    Pass,
    Split,
    compare,
    data,
    flat,
    net,
    non_reentrant,
    reentrant,
    reference,
)
from deepspeed.pipe import LayerSpec, PipelineModule
from engines import WIDTH, config, leave, parameters
from engines import start as start_process
from torch import nn

from deepspeed_plugins.auxiliary_loss import values
from deepspeed_plugins.seams import versions
from torch_plugins.config import ConfigError

# DeepSpeed asks for fast fp16; torch computes it, slowly, on any CPU.
deepspeed.get_accelerator().is_fp16_supported = lambda: True

CHECKPOINTS = versions.installed() >= (0, 19, 8)
"""Whether ``deepspeed.checkpointing`` works on CPU."""
DIVIDES_AT_OUTPUTS = versions.installed() < (0, 19, 6)
"""Whether ``engine.backward`` divides by the accumulation steps at each output of a forward, and so
at each stage of a pipeline."""


def settings(stage=0, parts=1, **sections):
    return config(
        stage,
        parts,
        gradient_clipping=0.0,
        zero_allow_untested_optimizer=True,
        optimizer={"type": "SGD", "params": {"lr": RATE}},
        **sections,
    )


FP16 = {"fp16": {"enabled": True, "loss_scale": 1024}}
BF16 = {"bf16": {"enabled": True}}


def build(model, json_, **options):
    options.setdefault("model_parameters", model.parameters())
    return deepspeed.initialize(model=model, config=copy.deepcopy(json_), **options)[0]


def square(engine, output):
    return output[0] if engine.module.several else output.float().pow(2).mean()


def by_engine(engine, x, parts):
    engine.backward(square(engine, engine(x)))


def by_keyword(engine, x, parts):
    engine.backward(loss=square(engine, engine(x)) / parts, scale_wrt_gas=False)


def by_scale(engine, x, parts):
    engine.scale(square(engine, engine(x))).backward()


def by_torch(engine, x, parts):
    square(engine, engine(x)).backward()


def train(engine, parts, differentiate=by_engine, steps=STEPS):
    """Optimizer steps; evaluation in between adds nothing."""
    dtype = next(engine.module.parameters()).dtype
    for step in range(steps):
        for part in range(parts):
            differentiate(engine, data(step, dist.get_rank(), part, dtype), parts)
            engine.step()
        with torch.no_grad():
            engine(data(9, 9, 9, dtype))


def case(stage=0, parts=1, differentiate=by_engine, model=None, client=False, **sections):
    """An engine's update against plain torch's."""
    model, json_, options = model or net(), settings(stage, parts, **sections), {}
    if client:
        del json_["optimizer"]
        options = {"optimizer": torch.optim.SGD(model.parameters(), lr=RATE)}
    engine = build(model, json_, **options)
    start = parameters(engine)
    train(engine, parts, differentiate)
    return compare(start, parameters(engine), dist.get_world_size(), parts)


def by_hand():
    """Two micro-batches that DeepSpeed knows nothing of, and their number in the JSON."""
    engine = build(net(), settings(1, deepspeed_plugins={"aux_micro_batches": 2}))
    start = parameters(engine)
    for step in range(STEPS):
        for part in range(2):
            engine.set_gradient_accumulation_boundary(part == 1)
            engine.backward(square(engine, engine(data(step, dist.get_rank(), part))) / 2)
        engine.step()
    return compare(start, parameters(engine), dist.get_world_size(), 2)


def twice():
    """``retain_graph``: two backward passes through one graph, half of the loss each."""

    def halves(engine, x, parts):
        half = square(engine, engine(x)) / 2
        engine.backward(half, retain_graph=True)
        engine.backward(half)

    return case(0, 1, halves)


def interleaved():
    """Two engines with other scales, each of whose passes lies between the other's."""
    engines = [build(net(), settings(1, 2, **FP16)), build(net(), settings(3, 1))]
    starts = [parameters(engine) for engine in engines]
    for step in range(STEPS):
        for part in range(2):
            x = data(step, dist.get_rank(), part)
            half, whole = square(engines[0], engines[0](x.half())), engines[1](x)
            engines[0].backward(half)
            if part == 0:
                engines[1].backward(square(engines[1], whole))
                engines[1].step()
            engines[0].step()
    found = {}
    for name, parts, start, engine in zip(("fp16", "ZeRO 3"), (2, 1), starts, engines, strict=True):
        whole, ranks = [t.float() for t in start], dist.get_world_size()
        means = [mean_value(engine), reference(whole, ranks, parts)[1][-1]]
        seen = compare(start, parameters(engine), ranks, parts)
        found[f"interleaved, {name}"] = seen | {"means": means}
    return found


def mean_value(engine):
    """Of the last step, over processes."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, float(values(engine)["penalty"]))
    return sum(ranks) / len(ranks)


class First(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.first, self.block = whole.first, whole.blocks[0]

    def forward(self, x):
        return self.block(self.first(x))


class Second(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.block, self.last = whole.blocks[1], whole.last

    def forward(self, h):
        return self.last(self.block(h))


def joint(parts):
    """One model in two engines: the pass of the second goes through the first."""
    whole = net()
    start = [p.detach().clone() for p in whole.parameters()]
    engines = [build(half, settings(1, parts)) for half in (First(whole), Second(whole))]
    for step in range(STEPS):
        for part in range(parts):
            y = engines[1](engines[0](data(step, dist.get_rank(), part)))
            engines[1].backward(y.pow(2).mean())
            for engine in engines:
                engine.step()
    end = [p.detach() for p in whole.parameters()]
    return compare(start, end, dist.get_world_size(), parts)


def pipeline(stage=0, parts=2, interval=0, block=Block, half=False, **sections):
    """Two stages with a block each; every rank compares its own, the worst counts."""
    whole = net()
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH)]
    layers += [LayerSpec(block, coefficient) for coefficient in COEFFICIENTS]
    layers += [LayerSpec(Head, WIDTH, 1)]
    model = PipelineModule(
        layers,
        num_stages=2,
        partition_method="uniform",
        loss_fn=lambda y, _: y.float().pow(2).mean(),
        activation_checkpoint_interval=interval,
    )
    rank = dist.get_rank()
    mine = slice(0, 4) if rank == 0 else slice(4, 8)
    with torch.no_grad():
        for parameter, value in zip(
            model.parameters(), list(whole.parameters())[mine], strict=True
        ):
            parameter.copy_(value)
    options = {"model_parameters": [p for p in model.parameters() if p.requires_grad]}
    engine = deepspeed.initialize(
        model=model, config=settings(stage, parts, **sections), **options
    )[0]
    dtype = torch.float16 if half else torch.float32
    start = [p.detach().clone().to(dtype) for p in whole.parameters()]
    for step in range(STEPS):
        batches = [(data(step, 0, part, dtype), torch.zeros(2, 1)) for part in range(parts)]
        engine.train_batch(data_iter=iter(batches))
    return engine, start, mine


def staged(**options):
    engine, start, mine = pipeline(**options)
    parts = engine.gradient_accumulation_steps()
    end = [p.detach() for p in engine.module.parameters()]
    result = compare(start, end, 1, parts, pick=lambda tensors: tensors[mine])
    everywhere = [None, None]
    dist.all_gather_object(everywhere, result)
    return max(everywhere, key=lambda found: found["error"])


def logged(folder):
    """``[samples, value]`` of each step in the monitor's file, torch's means, and the last one as
    the processes have it."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    engine = build(net(run=reentrant), settings(2, 2, csv_monitor=monitor))
    start = parameters(engine)
    train(engine, 2)
    means = reference(start, dist.get_world_size(), 2)[1]
    return [_rows(folder / "job"), means, mean_value(engine)]


def logged_by_stages(folder):
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "stages"}
    parts = 1 if DIVIDES_AT_OUTPUTS else 2
    _, start, _ = pipeline(1, parts, csv_monitor=monitor)
    return [_rows(folder / "stages"), reference(start, 1, parts)[1]]


def _rows(folder):
    if dist.get_rank() != 0:
        return []
    with open(folder / "Train_Samples_penalty.csv") as file:
        return [[float(x) for x in row] for row in list(csv.reader(file))[1:]]


def faults():
    """What DeepSpeed does without plugins, that the refusals are about: the ratio of its update to
    torch's, without auxiliary losses."""
    found = {}
    for name, json_, differentiate, several in (
        ("fp16", settings(0, 1, fp16={"enabled": True, "loss_scale": 4}), by_engine, False),
        ("outputs", settings(1, 2), by_torch, True),
        ("outputs, ZeRO 3", settings(3, 2), by_torch, True),
    ):
        plain = net(several=several)
        for block in plain.blocks:
            block.penalty = Pass()
        engine = build(plain, json_)
        start = parameters(engine)
        parts = engine.gradient_accumulation_steps()
        train(engine, parts, differentiate, steps=1)
        whole = [t.float() for t in start]
        expected = reference(whole, dist.get_world_size(), parts, auxiliary=False, steps=1)[0]
        moved = flat(parameters(engine), whole).norm() / flat(expected, whole).norm()
        found[name] = float(moved)
    return found


def attempt(function):
    try:
        function()
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refused():
    """What is raised, by case."""

    def lost():
        model = net()
        model.blocks = nn.ModuleList(Lost(c) for c in COEFFICIENTS)
        train(build(model, settings(1)), 1)

    def of_module():
        engine = build(net(), settings(0))
        train(engine, 1)
        engine.module(data(0, 0, 0)).sum().backward()

    def nothing():
        build(nn.Linear(2, 2), settings(deepspeed_plugins={"aux_micro_batches": 2}))

    return {
        "fp16": attempt(lambda: build(net(), settings(0, **FP16))),
        "outputs": attempt(lambda: case(1, 2, by_torch, net(several=True))),
        "lost": attempt(lost),
        "module": attempt(of_module),
        "nothing": attempt(nothing),
        "engine": attempt(lambda: case(1, 2, model=net(several=True))),
    }


def of_reference_models():
    """Whether an engine without an optimizer leaves the losses of its model alone."""
    json_ = settings()
    del json_["optimizer"]
    model = net()
    before = [block.penalty.scope for block in model.blocks]
    engine = deepspeed.initialize(model=model, config=json_)[0]
    with torch.no_grad():
        engine(data(0, 0, 0))
    return before == [block.penalty.scope for block in model.blocks] and values(engine) == {}


def matrix():
    """Every comparison with torch by name."""
    found = {f"fp32, ZeRO {s}, {g} parts": case(s, g) for s in range(4) for g in (1, 2)}
    found |= {f"bf16, ZeRO {s}": case(s, 2, **BF16) for s in range(4)}
    found |= {f"fp16, ZeRO {s}": case(s, 2, **FP16) for s in (1, 2, 3)}
    found |= interleaved()
    runs = [reentrant, non_reentrant]
    for run in [*runs, deepspeed.checkpointing.checkpoint][: 3 if CHECKPOINTS else 2]:
        for stage in (0, 2, 3):
            found[f"{run.__name__}, ZeRO {stage}"] = case(stage, 2, model=net(run=run))
    found |= {
        "scale_wrt_gas, ZeRO 0": case(0, 2, by_keyword),
        "scale_wrt_gas, ZeRO 3": case(3, 2, by_keyword),
        "engine.scale, ZeRO 1": case(1, 2, by_scale),
        "engine.scale, fp16": case(2, 2, by_scale, **FP16),
        "torch, ZeRO 2": case(2, 2, by_torch),
        "torch, ZeRO 3, loss and logits": case(3, 2, by_torch, net(several=True)),
        "torch, reentrant": case(2, 2, by_torch, net(run=reentrant)),
        "client": case(1, 2, client=True),
        "by hand": by_hand(),
        "twice": twice(),
        "joint": joint(1 if DIVIDES_AT_OUTPUTS else 2),
    }
    return found


def pipelines():
    parts = 1 if DIVIDES_AT_OUTPUTS else 2
    found = {
        "ZeRO 0": staged(stage=0, parts=parts),
        "ZeRO 1": staged(stage=1, parts=parts),
        "two tensors": staged(parts=parts, block=Split),
        "fp16": staged(stage=1, parts=parts, half=True, **FP16),
    }
    if CHECKPOINTS:
        found["checkpoints"] = staged(interval=1)
    return {f"pipeline, {name}": seen for name, seen in found.items()}


def main(record, folder):
    start_process()
    deepspeed.checkpointing.configure(None)
    folder = Path(folder)
    found = {"torch": matrix(), "logged": [logged(folder)]}
    found |= {"refused": refused(), "faults": faults(), "reference": of_reference_models()}
    found["torch"] |= pipelines()  # last: DeepSpeed keeps the grid of stages for the process
    found["logged"].append(logged_by_stages(folder))
    found["refused"]["stages"] = attempt(lambda: pipeline(1, 2))
    if dist.get_rank() == 0:
        with open(record, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
