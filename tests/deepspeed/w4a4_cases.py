"""W4A4 in real engines on two ranks, against plain torch with its formulas written out.

Started by test_w4a4.py; writes what happened to the JSON file given, and leaves checkpoints in the
folder given.
"""

import json
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from engines import leave, start
from torch import nn
from w4a4_checkpoints import checkpoints, composed, resumed, universal
from w4a4_net import (
    SECTION,
    SHARE,
    STEPS,
    WIDTH,
    batch,
    build,
    error,
    net,
    plain,
    raised,
    settings,
    train,
    whole,
)

from deepspeed_plugins.auxiliary_loss import values
from deepspeed_plugins.features import features_of
from torch_plugins.config import W4A4
from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM
from torch_plugins.w4a4.linear import fake_quant_linears, swap

FP16 = {"enabled": True, "loss_scale": 128}


def case(stage, parts=1, weight_bits=0, **others):
    """An engine's update against plain torch's, and against it without each part."""
    weights = {"weight_bits": weight_bits, "weight_group_size": 2, "clip_init": 2}
    engine = build(
        net(), settings(stage, parts, SECTION | (weights if weight_bits else {}), **others)
    )
    train(engine, 1 if weight_bits else STEPS)
    after = whole(engine)
    expected, starts, penalty = plain(parts, weight_bits=weight_bits)
    other = plain(parts, quantized=False, weight_bits=weight_bits)[0]
    without = plain(parts, weight_bits=weight_bits, penalty=0.0)[0]
    logged = torch.tensor(sum(float(v) for v in values(engine).values()))
    dist.all_reduce(logged)
    engine.destroy()
    return {
        "error": error(after, expected, starts),
        "unquantized": error(after, other, starts)["weights"],
        "without penalty": error(after, without, starts)["weights"],
        "moved": max((expected[n] - starts[n]).abs().max().item() for n in starts if "clip" in n),
        "logged": [float(logged) / dist.get_world_size(), penalty],
    }


def against_torch():
    found = {f"ZeRO {stage}, 2 parts": case(stage, 2) for stage in range(4)}
    found |= {f"ZeRO {stage}": case(stage) for stage in (0, 3)}
    found |= {f"ZeRO {stage}, weights": case(stage, weight_bits=4) for stage in (1, 3)}
    nothing = {"stage": 3, "stage3_param_persistence_threshold": 0}
    found["ZeRO 3, clips partitioned"] = case(3, 2, zero_optimization=nothing)
    alike = {"bf16": {"enabled": True}}
    found |= {f"bf16, ZeRO {stage}": case(stage, **alike) for stage in range(4)}
    found |= {f"fp16, ZeRO {stage}": case(stage, fp16=FP16) for stage in (1, 2, 3)}
    return found


def saved_weights():
    """How many tensors of a weight's shape a forward of ZeRO 3 keeps, beside the parameters."""
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64))
    section = {"weight_bits": 4, "kurtosis_weight": 0, "clip_init": 3}
    engine = build(model, settings(3, section=section))
    shapes, kept = {(64, WIDTH), (64, 64)}, []

    def pack(tensor):
        if tuple(tensor.shape) in shapes and not isinstance(tensor, nn.Parameter):
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine(batch(0, 0)).sum()
    engine.destroy()
    return kept


def overflow():
    """Steps that fp16 skips: clips are those of the first step that is taken."""
    section = SECTION | {"kurtosis_weight": 0}
    scale = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 100}
    engine = build(net(), settings(2, section=section, fp16=scale))
    modes, taken, steps = [], None, 0
    while taken is None or steps < taken + 3:
        modes.append(fake_quant_linears(engine.module)["0"].input_quantizer.mode.value)
        train(engine, 1, steps)
        steps += 1
        if taken is None and engine.skipped_steps < steps:
            taken = steps
            clip = whole(engine)["0.input_quantizer.clip_high"].item()
    last = whole(engine)["0.input_quantizer.clip_high"].item()
    inputs = [batch(taken - 1, rank).half().float() for rank in range(dist.get_world_size())]
    expected = max(torch.quantile(x, SHARE).item() for x in inputs)
    engine.destroy()
    return {"skipped": taken - 1, "modes": modes, "clips": [clip, expected, last]}


def modes():
    """By iteration, with evaluation on other data before the first."""
    engine = build(net(), settings(1, section=SECTION | {"start_iteration": 2}))
    seen = []
    for step in range(4):
        with torch.no_grad():
            engine(100 * batch(0, 0))
        engine.eval()
        engine(100 * batch(0, 0))
        engine.train()
        seen.append(fake_quant_linears(engine.module)["0"].input_quantizer.mode.value)
        train(engine, 1, step)
    highest = whole(engine)["0.input_quantizer.clip_high"].item()
    engine.destroy()
    return {"modes": seen, "highest": highest}


def rates(engine):
    """Of each group: rate, weight decay."""
    groups = engine.optimizer.param_groups
    return [[float(group["lr"]), float(group["weight_decay"])] for group in groups]


def groups():
    """Rates after two steps, however the optimizer comes."""
    found = {}
    warm = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.3, "warmup_num_steps": 1}}
    adam = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.2, "torch_adam": True}}

    def halves(model):
        others = [p for layer in model[1:] for p in layer.parameters()]
        first = {"params": list(model[0].parameters()), "lr": 0.2, "weight_decay": 0.0}
        return [first, {"params": others}]

    def record(name, model, json_file, **options):
        engine = build(model, json_file, **options)
        train(engine, 2)
        found[name] = rates(engine)
        engine.destroy()

    for stage in (1, 3):
        record(f"list, ZeRO {stage}", net(), settings(stage, optimizer=adam, scheduler=warm))
    model = net()
    record("none", model, settings(2, optimizer=adam), model_parameters=None)
    model = net()
    record("groups", model, settings(1, optimizer=adam), model_parameters=halves(model))
    model = net()
    swap(model, W4A4(**SECTION | {"clip_init": 2}))
    record("clips of before", model, settings(3, optimizer=adam))
    without = settings(1)
    del without["optimizer"]
    model = net()
    optimizer = torch.optim.AdamW(halves(model), lr=0.1, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    record("client", model, without, optimizer=optimizer, lr_scheduler=schedule)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    outside = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine = build(model, without, optimizer=optimizer)
    train(engine, 1)
    outside.step()
    train(engine, 1, 1)
    found["scheduler of the script"] = rates(engine)
    engine.destroy()
    model = net()
    record("callable", model, without, optimizer=lambda p: torch.optim.AdamW(p, 0.1))
    model = net()
    model[0].weight.requires_grad_(False)
    engine = build(model, settings(3))
    train(engine, 2)
    clip = model[0].input_quantizer.clip_high
    frozen = whole(engine)["0.input_quantizer.clip_high"].item()
    found["frozen"] = [clip.requires_grad, frozen]
    engine.destroy()
    return found


def refused():
    found = {}

    def no(name, json_file, model=None, **options):
        model = net() if model is None else model
        before = {key: type(module) for key, module in model.named_modules()}
        found[name] = raised(build, model, json_file, **options)
        assert before == {key: type(module) for key, module in model.named_modules()}

    no("autotp", settings(tensor_parallel={"autotp_size": 2}))
    no("pipeline", settings(), deepspeed.pipe.PipelineModule([nn.Linear(8, 8)], num_stages=1))
    no("nothing", settings(section={"modules": "*mlp*"}))
    no("field", settings(section={"kurtosis": 1}))
    muon = {"type": "Muon", "params": {"lr": 0.1}}
    no("muon", settings(optimizer=muon))
    experts = PluginDecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        dense_moe={"num_experts": 2, "gated": True},
    )
    no("experts", settings(), PluginDecoderForCausalLM(experts))
    swapped = net()
    swap(swapped, W4A4(modules="!4"))
    no("no section", settings(section=None), swapped)
    no("other bits", settings(section=SECTION | {"activation_bits": 8}), swapped)
    both = settings(key="compression_training")
    both["deepspeed_plugins"] = {"w4a4": {}}
    no("both", both)
    beside = settings(key="compression_training")
    beside["compression_training"]["weight_quantization"] = {}
    found["beside"] = raised(features_of, beside)
    model = net()
    unseen = nn.ModuleList([model, nn.Linear(3, 3)])
    unseen.forward = lambda x: model(x)
    engine = build(unseen, settings(section=SECTION | {"modules": "!0.4"}))
    found["unseen"] = raised(train, engine, 1)
    engine.destroy()
    engine = build(net(), settings(section={"clip_init": 2}, steps_per_print=1))
    with torch.no_grad():
        engine.module[2].input_quantizer.clip_high.fill_(-5)
    found["order"] = raised(train, engine, 1)
    engine.destroy()
    return found


def alone():
    """Engines without an optimizer, and a DeepSpeed that reads the alias."""
    json_file = settings(key="compression_training")
    engine = build(net(), json_file)
    found = {"alias": sorted(fake_quant_linears(engine.module))}
    engine.destroy()
    for stage, fields in ((1, {"activation_bits": 0}), (3, {"granularity": "token"})):
        engine = build(net(), settings(stage, section=SECTION | fields))
        train(engine, 2)
        found[str(fields)] = len(engine.optimizer.param_groups)
        engine.destroy()
    json_file = settings()
    del json_file["optimizer"]
    engine = deepspeed.initialize(model=net(), config=json_file)[0]
    found["left alone"] = sorted(fake_quant_linears(engine.module))
    engine.destroy()
    json_file["deepspeed_plugins"]["apply_to"] = "all"
    json_file["deepspeed_plugins"]["w4a4"] = SECTION | {"clip_init": 2}
    engine = deepspeed.initialize(model=net(), config=json_file)[0]
    found["all"] = sorted(fake_quant_linears(engine.module))
    engine.destroy()
    return found


def main(record, folder):
    warnings.simplefilter("ignore")
    start()
    result = {"refused": refused(), "torch": against_torch(), "saved": saved_weights()}
    result |= {"overflow": overflow(), "modes": modes(), "groups": groups(), "alone": alone()}
    result |= {"resumed": resumed(folder), "composed": composed(folder)}
    result |= {"universal": universal(folder), "checkpoints": checkpoints(folder)}
    if dist.get_rank() == 0:
        record.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
