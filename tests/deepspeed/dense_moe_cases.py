"""DS-MoE in real engines on two ranks, against plain torch with the losses written out.

Started by test_dense_moe.py; writes what happened to the JSON file given, and leaves checkpoints in
the folder given.
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
from engines import config, leave, parameters, start
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from deepspeed_plugins.auxiliary_loss import values
from deepspeed_plugins.seams import versions
from torch_plugins.config import ConfigError, DenseMoE
from torch_plugins.hf import PluginDecoderForCausalLM
from torch_plugins.hf.convert import convert

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
EXPERTS = {"num_experts": 4, "attention_experts": 2, "router_hidden_size": 6}
WEIGHTS = {"mlp": 0.8, "attention": 0.5}
SECTION = EXPERTS | {f"mi_weight_{kind}": weight for kind, weight in WEIGHTS.items()}
SPARSE = {
    "inference": "top-k",
    "top_k": 1,
    "attention_inference": "top-k",
    "attention_top_k": 1,
}
RATE, STEPS = 0.1, 2
PARTS = 2 if versions.installed() >= (0, 19, 6) else 1
"""Micro-batches. Older releases divide at each output of a model, of loss and logits twice."""
STAGES = range(4)


def stock(seed=7):
    torch.manual_seed(seed)
    return LlamaForCausalLM(copy.deepcopy(LLAMA))


def sure():
    """A model with experts whose routers choose clearly: their losses have gradients."""
    model = stock()
    convert(model, [DenseMoE.from_dict(SECTION | {"gated": True})])
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(0, 0.5)
    return model


def settings(stage, parts=1, section=SECTION, **others):
    """JSON of an engine; ``section`` with the keys beside the feature."""
    beside = {"expert_init"} & section.keys()
    plugins = {"dense_moe": {k: v for k, v in section.items() if k not in beside}}
    plugins |= {k: section[k] for k in beside}
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": RATE}}}
    sections = sgd | {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True} | others
    return config(stage, parts, deepspeed_plugins=plugins, **sections)


def build(model, json_file, **options):
    if "optimizer" not in options:
        options.setdefault("model_parameters", list(model.parameters()))
    return deepspeed.initialize(model=model, config=copy.deepcopy(json_file), **options)[0]


def batch(step, rank, part=0):
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    return torch.randint(0, LLAMA.vocab_size, (2, 9), generator=generator)


def entropy(p):
    return -(p * p.log()).sum(-1)


@cache
def plain(reduction, auxiliary=True):
    """Parameters, and by kind the losses of the last step, of plain torch."""
    model = sure()
    convert(model, [DenseMoE.from_dict(EXPERTS | {"gated": True} | NO_LOSS)])
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(
                lambda _m, _i, scores, name=name: seen.setdefault(name, []).append(scores)
            )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    places = [(rank, part) for part in range(PARTS) for rank in range(dist.get_world_size())]
    for step in range(STEPS):
        seen.clear()
        total, means = 0.0, dict.fromkeys(WEIGHTS, 0.0)
        for rank, part in places:
            ids = batch(step, rank, part)
            total = total + model(ids, labels=ids).loss / len(places)
        for name, scores in seen.items():
            kind = "attention" if "self_attn" in name else "mlp"
            flat = [each.flatten(0, -2) for each in scores]
            if reduction == "data-parallel":  # ranks of a micro-batch lie side by side
                ranks = dist.get_world_size()
                flat = [torch.cat(flat[i : i + ranks]) for i in range(0, len(flat), ranks)]
            loss = sum(entropy(p).mean() - entropy(p.mean(0)) for p in flat) / len(flat)
            means[kind] += loss.item()
            total = total + (WEIGHTS[kind] * loss if auxiliary else 0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], means


NO_LOSS = {"mi_weight_mlp": 0, "mi_weight_attention": 0}


def flat(ones, others):
    return torch.cat([(a - b).flatten() for a, b in zip(ones, others, strict=True)]).double()


def train(engine, sparse=False):
    """Steps; with ``sparse``, evaluation with other experts on each rank in between."""
    for step in range(STEPS):
        for part in range(PARTS):
            ids = batch(step, dist.get_rank(), part)
            engine.backward(engine(ids, labels=ids).loss)
            engine.step()
        if sparse:
            evaluate(engine)


def evaluate(engine):
    """Logits of this rank with one expert, and how far they are from the whole model's."""
    model = engine.module
    engine.eval()
    model.set_experts(**SPARSE)
    ids = batch(50, dist.get_rank())
    with torch.no_grad():
        found = engine(ids).logits
    whole = PluginDecoderForCausalLM(copy.deepcopy(model.config)).eval()
    chosen = {}
    for name, module in whole.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(
                lambda _m, _i, scores, name=name: chosen.update({name: scores.argmax(-1)})
            )
    with torch.no_grad():
        for parameter, value in zip(whole.parameters(), parameters(engine), strict=True):
            parameter.copy_(value)
        expected = whole(ids).logits
        whole.set_experts(inference="dense", attention_inference="dense")
        dense = whole(ids).logits
    model.set_experts(inference="dense", attention_inference="dense")
    engine.train()
    experts = {name: sorted(set(each.flatten().tolist())) for name, each in chosen.items()}
    return {
        "error": (found - expected).abs().max().item(),
        "dense": (dense - expected).abs().max().item(),
        "experts": experts,
    }


def case(stage, reduction="local", checkpointing=None, sparse=False):
    """An engine's update against plain torch's, and its logged losses."""
    model = sure()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    section = SECTION | {"mi_reduction": reduction}
    engine = build(model, settings(stage, PARTS, section))
    before = parameters(engine)
    train(engine, sparse)
    after = parameters(engine)
    expected, means = plain(reduction)
    without, _ = plain(reduction, auxiliary=False)
    other, _ = plain("local" if reduction == "data-parallel" else "data-parallel")
    update = flat(expected, before)
    logged = [None] * dist.get_world_size()
    own = {kind: float(values(engine)[f"mi_{kind}"]) for kind in WEIGHTS}
    dist.all_gather_object(logged, own)
    engine.destroy()
    return {
        "error": float((flat(after, before) - update).norm() / update.norm()),
        "without": float((flat(without, before) - update).norm() / update.norm()),
        "other reduction": float((flat(other, before) - update).norm() / update.norm()),
        "logged": {k: [sum(each[k] for each in logged) / len(logged), means[k]] for k in WEIGHTS},
    }


def against_torch():
    found = {f"ZeRO {stage}, local": case(stage) for stage in STAGES}
    found |= {f"ZeRO {stage}, data-parallel": case(stage, "data-parallel") for stage in (0, 2, 3)}
    for kind in ("reentrant", "non-reentrant"):
        for stage in (1, 3):
            reduction = "data-parallel" if stage == 3 else "local"
            found[f"ZeRO {stage}, {kind}"] = case(stage, reduction, kind)
    found["ZeRO 3, evaluation between"] = case(3, sparse=True)
    return found


def sparse_phases(folder):
    """Of both ranks: evaluation before, between and after training steps, under ZeRO 3; and of an
    engine whose JSON does not name the experts that its model has."""
    engine = build(sure(), settings(3, PARTS))
    found = [evaluate(engine)]
    train(engine)
    found += [evaluate(engine), evaluate(engine)]
    json_file = settings(3, PARTS)
    del json_file["deepspeed_plugins"]
    found.append(evaluate(build(sure(), json_file)))
    engine.save_checkpoint(str(folder / "sure"))
    with torch.no_grad():
        logits = engine(batch(0, 0)).logits
    if dist.get_rank() == 0:
        torch.save({"ids": batch(0, 0), "logits": logits}, folder / "logits.pt")
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


def digest(tensors):
    """Whether the tensors are the same on all ranks."""
    sums = [None] * dist.get_world_size()
    dist.all_gather_object(sums, [t.double().sum().item() for t in tensors])
    return all(each == sums[0] for each in sums)


def converted(stage, init, partitioned=None, client=False):
    """A stock model that the JSON gives experts, each rank with random numbers of its own."""
    torch.manual_seed(11)
    json_file = settings(stage, section=SECTION | {"expert_init": init})
    if partitioned is not None:
        keep = HfDeepSpeedConfig(json_file)  # while it lives, from_pretrained partitions
        model = LlamaForCausalLM.from_pretrained(partitioned)
        del keep
    else:
        model = stock()
    dense = stock()
    options = {}
    if client:
        del json_file["optimizer"]
        norms = [p for p in model.parameters() if p.ndim == 1]
        others = [p for p in model.parameters() if p.ndim > 1]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others}]
        options["optimizer"] = torch.optim.SGD(groups, lr=RATE)
    torch.manual_seed(100 + dist.get_rank())
    engine = build(model, json_file, **options)
    whole = parameters(engine)
    names = [name for name, _ in engine.module.named_parameters()]
    ids = batch(0, dist.get_rank())
    with torch.no_grad():
        expected = dense(ids, labels=ids).logits
        engine.eval()
        found = engine(ids, labels=ids).logits
        engine.train()
    for step in range(STEPS):  # a hidden matrix has a gradient once the last one is not 0
        loss = engine(batch(step, dist.get_rank()), labels=batch(step, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
    moved = [not torch.equal(a, b) for a, b in zip(whole, parameters(engine), strict=True)]
    spread = {
        name: tensor.std().item()
        for name, tensor in zip(names, whole, strict=True)
        if name.startswith("model.layers.1")
    }
    engine.destroy()
    return {
        "logits": (found - expected).abs().max().item(),
        "alike": digest(whole),
        "still": [name for name, did in zip(names, moved, strict=True) if not did],
        "spread": spread,
    }


def conversions(folder):
    if dist.get_rank() == 0:
        stock().save_pretrained(folder / "stock")
    dist.barrier()
    found = {f"ZeRO {stage}, blocks": converted(stage, "blocks") for stage in STAGES}
    found |= {f"ZeRO {stage}, fresh": converted(stage, "fresh") for stage in (1, 3)}
    found |= {
        f"partitioned, {init}": converted(3, init, folder / "stock") for init in ("blocks", "fresh")
    }
    found |= {f"client, ZeRO {s}": converted(s, "blocks", client=True) for s in (1, 3)}
    return found


def refused():
    cases = {
        "autotp": settings(0, tensor_parallel={"autotp_size": 2}),
        "experts": settings(0, section=SECTION | {"num_experts": 3}),
        "gated": settings(0, section=SECTION | {"gated": False}),
        "heads": settings(0, section=SECTION | {"attention_experts": 4}),
        "init": settings(0, section=SECTION | {"expert_init": "block"}),
    }
    lone = settings(0, section=SECTION | {"expert_init": "fresh"})
    lone["deepspeed_plugins"] = {"expert_init": "fresh", "ladder_residual": {}}
    messages = {}
    for name, json_file in (cases | {"lone": lone}).items():
        model = stock()
        try:
            build(model, json_file)
        except ConfigError as error:
            messages[name] = str(error)
        assert type(model) is LlamaForCausalLM
    json_file = settings(0, tensor_parallel={"autotp_size": 2})
    del json_file["deepspeed_plugins"]
    try:
        build(sure(), json_file)
    except ConfigError as error:
        messages["autotp without section"] = str(error)
    pipeline = deepspeed.pipe.PipelineModule([nn.Linear(8, 8)], num_stages=1)
    try:
        build(pipeline, settings(0))
    except ConfigError as error:
        messages["pipeline"] = str(error)
    return messages


def main(record, folder):
    warnings.simplefilter("ignore")
    start()
    result = {"refused": refused(), "conversions": conversions(folder)}
    result |= {"torch": against_torch(), "sparse": sparse_phases(folder)}
    if dist.get_rank() == 0:
        record.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
