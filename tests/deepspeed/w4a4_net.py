"""A small model with W4A4, and what plain torch makes of it, for w4a4_cases.py."""

import copy
from functools import cache

import deepspeed
import torch
import torch.distributed as dist
from engines import config
from torch import nn

from torch_plugins.config import ConfigError

# DeepSpeed asks for fast fp16; torch computes it, slowly, on any CPU.
deepspeed.get_accelerator().is_fp16_supported = lambda: True

WIDTH, RATE, KURTOSIS, SHARE, MULT, STEPS = 8, 0.05, 0.05, 0.98, 8.0, 3
SECTION = {
    "kurtosis_weight": KURTOSIS,
    "clip_init": f"percentile:{100 * SHARE:g}",
    "clip_lr_mult": MULT,
    "modules": "!4",
}


def net(seed=3):
    """Layers 0 and 2 have W4A4; 4 is the output layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 6, bias=False), nn.Tanh(), nn.Linear(6, 1)
    )


def settings(stage=0, parts=1, section=SECTION, key="deepspeed_plugins", **others):
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": RATE}}}
    sections = sgd | {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True} | others
    plugins = {} if section is None else {key: {"w4a4": section}}
    return config(stage, parts, **plugins, **sections)


def build(model, json_file, **options):
    if "optimizer" in json_file:
        options.setdefault("model_parameters", list(model.parameters()))
    return deepspeed.initialize(model=model, config=copy.deepcopy(json_file), **options)[0]


def batch(step, rank, part=0):
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    return 2 * torch.randn(5, WIDTH, generator=generator)


def whole(engine_or_model):
    """Copies of all parameters by name, whole on every rank."""
    model = getattr(engine_or_model, "module", engine_or_model)
    named = dict(model.named_parameters())
    partitioned = any(hasattr(p, "ds_id") for p in named.values())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=partitioned):
        return {name: p.detach().clone().float() for name, p in named.items()}


def train(engine, steps=STEPS, first=0):
    parts, losses = engine.gradient_accumulation_steps(), []
    for step in range(first, first + steps):
        for part in range(parts):
            x = batch(step, dist.get_rank(), part).to(next(engine.module.parameters()).dtype)
            loss = engine(x).pow(2).mean()
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    return losses


def levels(x, high, low, bits=4):
    """The nearest of 2 ** bits levels; a straight-through rounding under autograd."""
    step = (high - low) / (2**bits - 1)
    place = (torch.maximum(torch.minimum(x, high), low) - low) / step
    return low + step * (place + (place.round() - place).detach())


def rows(weight, bits, size):
    groups = weight.unflatten(1, (-1, size))
    step = 2 * groups.detach().abs().amax(-1, keepdim=True) / (2**bits - 1)
    codes = (groups.detach() / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (groups + (step * codes - groups).detach()).flatten(1)


def kurtosis(y):
    z = y - y.mean(-1, keepdim=True)
    return ((z**4).mean(-1) / ((z**2).mean(-1) ** 2 + 1e-20)).mean()


@cache
def plain(parts, quantized=True, weight_bits=0, penalty=KURTOSIS):
    """Parameters by name, where clips started, and the kurtosis of the last step, of plain torch on
    all data. With ``weight_bits``, of one step with clips of 2: a row's largest weight lies between
    two levels, and what rounds it differently later would count."""
    model = net()
    layers = {0: model[0], 2: model[2]}
    clips, begun = dict.fromkeys(layers), {}
    if weight_bits:
        clips = {i: [torch.tensor([c], requires_grad=True) for c in (2.0, -2.0)] for i in layers}
        begun = {index: [2.0, -2.0] for index in layers}
    places = [(rank, part) for rank in range(dist.get_world_size()) for part in range(parts)]
    for step in range(1 if weight_bits else STEPS):
        total, seen, penalties = 0.0, {index: [] for index in layers}, {}
        for place in places:
            x = batch(step, *place)
            for index in range(5):
                if index not in layers:
                    x = model[index](x)
                    continue
                seen[index].append(x.detach())
                if quantized and clips[index] is not None:
                    x = levels(x, *clips[index])
                weight = layers[index].weight
                weight = rows(weight, weight_bits, 2) if weight_bits else weight
                x = nn.functional.linear(x, weight, layers[index].bias)
                penalties[index] = penalties.get(index, 0) + kurtosis(x) / len(places)
            total = total + x.pow(2).mean() / len(places)
        total = total + penalty * sum(penalties.values())
        own = [clip for pair in clips.values() if pair is not None for clip in pair]
        parameters = [*model.parameters(), *own]
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                rate = RATE if number < len(list(model.parameters())) else MULT * RATE
                if gradient is not None:
                    parameter -= rate * gradient
        for index, inputs in seen.items():
            if clips[index] is None:
                flat = [each.flatten() for each in inputs]
                high = max(torch.quantile(each, SHARE) for each in flat)
                low = min(torch.quantile(each, 1 - SHARE) for each in flat)
                clips[index] = [c.reshape(1).clone().requires_grad_() for c in (high, low)]
                begun[index] = high.item(), low.item()
    named, starts = (
        {name: p.detach() for name, p in net_.named_parameters()} for net_ in (model, net())
    )
    for index, pair in clips.items():
        for name, clip, start_ in zip(("clip_high", "clip_low"), pair, begun[index], strict=True):
            named[f"{index}.input_quantizer.{name}"] = clip.detach()
            starts[f"{index}.input_quantizer.{name}"] = torch.tensor([start_])
    return named, starts, sum(float(each) for each in penalties.values())


def error(found, expected, starts):
    """Of weights and of clips, relative to their updates."""
    result = {}
    for kind in ("weights", "clips"):
        names = [name for name in expected if ("clip" in name) == (kind == "clips")]
        update, wrong = (
            torch.cat([(expected[name] - other[name]).flatten() for name in names])
            for other in (starts, found)
        )
        result[kind] = float(wrong.norm() / update.norm())
    return result


def raised(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ConfigError as problem:
        return str(problem)
    return None
