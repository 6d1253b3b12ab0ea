"""W4A4 in real engines on two ranks, against plain torch with its formulas written out.

Started by test_w4a4.py; writes what happened to the JSON file given, and leaves checkpoints in the
folder given.
"""

import copy
import json
import sys
import warnings
from functools import cache
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import config, leave, start
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from deepspeed_plugins.auxiliary_loss import values
from deepspeed_plugins.features import features_of
from deepspeed_plugins.seams import versions
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM
from torch_plugins.w4a4.linear import fake_quant_linears, swap

# DeepSpeed asks for fast fp16; torch computes it, slowly, on any CPU.
deepspeed.get_accelerator().is_fp16_supported = lambda: True

WIDTH, RATE, KURTOSIS, SHARE, MULT, STEPS = 8, 0.05, 0.05, 0.98, 8.0, 3
SECTION = {
    "kurtosis_weight": KURTOSIS,
    "clip_init": f"percentile:{100 * SHARE:g}",
    "clip_lr_mult": MULT,
    "modules": "!4",
}
FP16 = {"enabled": True, "loss_scale": 128}
REPEATABLE = versions.installed() >= (0, 19, 8)


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


def resumed(folder):
    """Whether a resumed run ends as the straight one, to the bit."""
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    found = {}
    for name, stage, start_at in (("0", 0, 0), ("1", 1, 0), ("3", 3, 0), ("late", 2, 3)):
        section = SECTION | {"start_iteration": start_at}
        json_file = settings(stage, section=section, optimizer=adam)
        engine = build(net(), json_file)
        train(engine, 2)
        engine.save_checkpoint(str(folder / name), client_state={"mine": stage})
        train(engine, 3, 2)
        straight = whole(engine)
        engine.destroy()
        engine = build(net(5), json_file)
        _, state = engine.load_checkpoint(str(folder / name))
        train(engine, 3, 2)
        again = whole(engine)
        engine.destroy()
        found[name] = {
            "equal": all(torch.equal(straight[key], again[key]) for key in straight),
            "state": {key: value for key, value in state.items() if "mine" in key or "w4a4" in key},
            "clip": straight["0.input_quantizer.clip_high"].item(),
        }
    return found


def universal(folder):
    """ZeRO 1, saved above, as a universal checkpoint in ZeRO 1 on the same ranks."""
    from deepspeed.checkpoint import ds_to_universal

    source, target = folder / "1" / "global_step2", folder / "universal" / "global_step2"
    if dist.get_rank() == 0:
        words = ["--input_folder", source, "--output_folder", target, "--inject_missing_state"]
        words += ["--num_extract_workers", 1, "--num_merge_workers", 1]
        sys.argv = ["ds_to_universal", *map(str, words)]
        ds_to_universal.main(ds_to_universal.parse_arguments())
        (folder / "universal" / "latest_universal").write_text("global_step2")
    dist.barrier()
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    json_file = settings(1, optimizer=adam, checkpoint={"load_universal": True})
    engine = build(net(5), json_file)
    engine.load_checkpoint(str(folder / "universal"))
    train(engine, 3, 2)
    found = whole(engine)["0.input_quantizer.clip_high"].item()
    engine.destroy()
    return found


def raised(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ConfigError as problem:
        return str(problem)
    return None


def checkpoints(folder):
    """What is said of checkpoints of other models, and the start from a plain one."""
    found = {}
    for stage in (1, 3):
        engine = build(net(), settings(stage, section=None))
        train(engine, 1)
        place = str(folder / f"plain-{stage}")
        engine.save_checkpoint(place)
        found[f"ZeRO {stage}, with into without"] = raised(
            engine.load_checkpoint, str(folder / str(stage))
        )
        engine.destroy()
        engine = build(net(), settings(stage))
        found[f"ZeRO {stage}, without into with"] = raised(engine.load_checkpoint, place)
        engine.destroy()
        model = net(5)
        model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(place))
        engine = build(model, settings(stage))
        train(engine, 2)
        found[f"ZeRO {stage}, start"] = whole(engine)["0.input_quantizer.clip_high"].item()
        engine.destroy()
    engine = build(net(), settings(1, section=SECTION | {"activation_bits": 3}))
    found["other bits"] = raised(engine.load_checkpoint, str(folder / "1"))
    engine.destroy()
    return found


LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def llama(json_file, steps=2, path=None):
    torch.manual_seed(7)
    if path is None:
        model = LlamaForCausalLM(copy.deepcopy(LLAMA))
    else:
        keep = HfDeepSpeedConfig(json_file)  # while it lives, from_pretrained partitions
        model = LlamaForCausalLM.from_pretrained(path)
        del keep
    engine = build(model, json_file)
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(0, LLAMA.vocab_size, (2, 9), generator=generator)
        engine.backward(engine(ids, labels=ids).loss)
        engine.step()
    return engine


def composed(folder):
    """A stock model that becomes a ladder with W4A4; a plain one, partitioned and not."""
    section = {"kurtosis_weight": 1e-3, "modules": "*mlp.*"}
    json_file = settings(1, section=section)
    json_file["deepspeed_plugins"] |= {"ladder_residual": {}}
    engine = llama(json_file)
    engine.save_checkpoint(str(folder / "ladder"))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        logits = engine.module(ids).logits
    if dist.get_rank() == 0:
        torch.save({"ids": ids, "logits": logits}, folder / "logits.pt")
    found = {"layers": sorted(fake_quant_linears(engine.module))}
    engine.destroy()
    if dist.get_rank() == 0:
        torch.manual_seed(7)
        LlamaForCausalLM(copy.deepcopy(LLAMA)).save_pretrained(folder / "llama")
    dist.barrier()
    ones = llama(settings(3, section=section), path=folder / "llama")
    others = llama(settings(1, section=section))
    pair = whole(ones), whole(others)
    differences = [(pair[0][key] - pair[1][key]).abs().max().item() for key in pair[1]]
    found["partitioned"] = max(differences)
    if dist.get_rank() == 0:
        others.module.save_pretrained(folder / "saved")
    ones.destroy()
    others.destroy()
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
