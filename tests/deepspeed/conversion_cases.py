"""Converted models in real engines, against plain torch on the converted model.

Started by test_conversion.py on every number of ranks; writes what happened to the JSON file given,
and leaves checkpoints in the folder given.
"""

import copy
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from engines import config, leave, parameters
from transformers import GraniteConfig, LlamaConfig, Qwen3Config
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from deepspeed_plugins.export.checkpoint import read
from deepspeed_plugins.seams import versions
from torch_plugins.config import ConfigError, CrossLayerAttention, DesyncResidual, LadderResidual
from torch_plugins.hf.convert import convert

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = LlamaConfig(**SIZES)
QWEN3 = Qwen3Config(**SIZES, head_dim=8)
GRANITE = GraniteConfig(**SIZES, tie_word_embeddings=True, residual_multiplier=0.3)
LADDER = {"ladder_residual": {"layers": "all"}}
SHARED = {"cross_layer_attention": {"sharing_factor": 2}}
BOTH = LADDER | {"cross_layer_attention": {"sharing_factor": 2, "kv_norm": "separate"}}
DESYNC = {"desync_residual": {"pattern": "4x", "ranks": 2}}
FEATURES = {
    "ladder": (LLAMA, LADDER),
    "sharing": (GRANITE, SHARED),
    "both": (QWEN3, BOTH),
    "desync": (QWEN3, DESYNC),
}
STAGES = range(4)
STEPS, STOP, RATE = 4, 2, 0.01
OLD = versions.installed() < (0, 19, 8)
"""Its Muon refuses ZeRO 3, or gathers gradients of unlike shapes, which gloo refuses."""


def stock(family=LLAMA, seed=7):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(family))


def settings(stage, section, **others):
    """JSON of an engine."""
    adamw = {"type": "AdamW", "params": {"lr": RATE, "torch_adam": True}}
    sections = {"optimizer": adamw, "gradient_clipping": 0.0} | others
    return config(stage, deepspeed_plugins=section, **sections)


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, SIZES["vocab_size"], (2, 9), generator=generator)


def build(stage, section, model, **options):
    options.setdefault("model_parameters", list(model.parameters()))
    if "config" not in options:
        options["config"] = settings(stage, section)
    return deepspeed.initialize(model=model, **options)[0]


def train(engine, first=0, last=STEPS):
    """Losses of this rank."""
    losses = []
    for step in range(first, last):
        ids = batch(step, dist.get_rank())
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def features_of(section):
    kinds = {kind.key(): kind for kind in (LadderResidual, CrossLayerAttention, DesyncResidual)}
    return [kinds[key].from_dict(fields) for key, fields in section.items()]


def plain(family, section, steps=STEPS):
    """This rank's losses and the parameters of the same training in plain torch."""
    model = stock(family)
    convert(model, features_of(section))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        every = [batch(step, rank) for rank in range(dist.get_world_size())]
        each = [model(ids, labels=ids).loss for ids in every]
        (sum(each) / len(each)).backward()
        optimizer.step()
        losses.append(each[dist.get_rank()].item())
    return losses, [parameter.detach() for parameter in model.parameters()]


def apart(ones, others):
    """The largest difference of two lists of numbers or tensors."""
    pairs = zip(ones, others, strict=True)
    return max((torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() for a, b in pairs)


def against_torch(folder, names):
    """By feature and stage: differences of losses and parameters, the resumed run, checkpoints."""
    result = {}
    for name in names:
        family, section = FEATURES[name]
        losses, expected = plain(family, section)
        for stage in STAGES:
            place = str(folder / f"{name}-{stage}")
            engine = build(stage, section, stock(family))
            found = train(engine, last=STOP)
            engine.save_checkpoint(place, tag="half", client_state={"mine": stage})
            found += train(engine, first=STOP)
            straight = parameters(engine)
            engine.save_checkpoint(place)
            if name == "both":
                logits(engine, folder / f"logits-{stage}.pt")

            engine = build(stage, section, stock(family, seed=8))
            _, state = engine.load_checkpoint(place, tag="half")
            train(engine, first=STOP)
            result[f"{name}, ZeRO {stage}"] = {
                "losses": apart(found, losses),
                "parameters": apart(straight, expected),
                "resumed": all(map(torch.equal, straight, parameters(engine))),
                "state": {k: v for k, v in state.items() if k in ("mine", "plugin_decoder")},
            }
    return result


def logits(engine, file):
    """Keep the logits of a batch, for the export to be compared with."""
    with torch.no_grad():
        found = engine(batch(0, 0)).logits
    if dist.get_rank() == 0:
        torch.save({"ids": batch(0, 0), "logits": found}, file)


def half_of(model):
    """Groups of an optimizer: norms without weight decay."""
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    return [{"params": others}, {"params": norms, "weight_decay": 0.0}]


def optimizers():
    """By way of naming the parameters and stage: whether all train, and no other is held."""
    adamw = {"lr": RATE}
    ways = {
        "none": lambda model: {"model_parameters": None},
        "list": lambda model: {},
        "generator": lambda model: {"model_parameters": model.parameters()},
        "filter": lambda model: {
            "model_parameters": filter(lambda p: p.requires_grad, list(model.parameters()))
        },
        "groups": lambda model: {"model_parameters": half_of(model)},
        "client": lambda model: {"optimizer": torch.optim.AdamW(half_of(model), **adamw)},
        "callable": lambda model: {"optimizer": lambda p: torch.optim.AdamW(p, **adamw)},
    }
    result = {}
    for name, way in ways.items():
        for stage in (1, 3):
            model = stock(QWEN3)
            options = way(model)
            json_file = settings(stage, BOTH)
            if "optimizer" in options:
                del json_file["optimizer"]
                json_file["zero_allow_untested_optimizer"] = True
            engine = build(stage, BOTH, model, config=json_file, **options)
            before = parameters(engine)
            train(engine, last=1)
            after = parameters(engine)
            moved = {
                n: not torch.equal(a, b)
                for (n, _), a, b in zip(model.named_parameters(), before, after, strict=True)
            }
            result[f"{name}, ZeRO {stage}"] = moved
    return result


def muon(folder):
    """By stage: whether Muon trains a model that the JSON converts as one that was converted
    before, moves all parameters, and goes on from a checkpoint as straight on."""
    result = {}
    for stage in (1,) if OLD else (1, 3):
        json_file = settings(
            stage,
            BOTH,
            optimizer={"type": "Muon", "params": {"lr": RATE, "torch_adam": True}},
            zero_optimization={"stage": stage, "reduce_scatter": False},
        )
        engine = build(stage, BOTH, stock(QWEN3), config=copy.deepcopy(json_file))
        before = parameters(engine)
        train(engine, last=STOP)
        engine.save_checkpoint(str(folder / f"muon-{stage}"))
        train(engine, first=STOP)
        straight = parameters(engine)
        engine = build(stage, BOTH, stock(QWEN3, seed=8), config=copy.deepcopy(json_file))
        engine.load_checkpoint(str(folder / f"muon-{stage}"))
        train(engine, first=STOP)
        resumed = parameters(engine)
        model = stock(QWEN3)
        convert(model, features_of(BOTH))
        del json_file["deepspeed_plugins"]
        engine = build(stage, BOTH, model, config=json_file)
        train(engine)
        result[f"ZeRO {stage}"] = {
            "as before": all(map(torch.equal, straight, parameters(engine))),
            "moved": not any(map(torch.equal, straight, before)),
            "resumed": all(map(torch.equal, straight, resumed)),
        }
    return result


def partitioned(folder):
    """Losses of a model whose weights zero.Init partitioned before the engine converts it, against
    those of one that was whole."""
    mean = BOTH | {"kv_init": "mean"}
    json_file = settings(3, mean)
    expected = train(build(3, mean, stock(GRANITE)))
    if dist.get_rank() == 0:
        stock(GRANITE).save_pretrained(folder / "stock")
    dist.barrier()
    keep = HfDeepSpeedConfig(json_file)  # while it lives, from_pretrained partitions
    model = AutoModelForCausalLM.from_pretrained(folder / "stock")
    del keep
    shapes = {tuple(p.shape) for p in model.parameters()}
    engine = build(3, mean, model)
    losses = train(engine)
    engine.save_checkpoint(str(folder / "both-partitioned"))
    logits(engine, folder / "logits-partitioned.pt")
    return {"shapes": sorted(shapes), "losses": apart(losses, expected)}


def left_alone():
    """Classes of models of engines without an optimizer."""
    names = {}
    for name, section in {"trained": LADDER, "all": {**LADDER, "apply_to": "all"}}.items():
        json_file = settings(0, section)
        del json_file["optimizer"]
        engine = deepspeed.initialize(model=stock(), config=json_file)[0]
        names[name] = type(engine.module).__name__
    return names


def again():
    """Whether a second engine on the same model trains on as the first."""
    model = stock(QWEN3)
    held = list(model.parameters())
    first = build(1, BOTH, model, model_parameters=held)
    state = dict(model.named_parameters())
    first.destroy()
    second = build(1, BOTH, model, model_parameters=held)
    same = all(state[name] is parameter for name, parameter in model.named_parameters())
    expected, _ = plain(QWEN3, BOTH)
    return {"same": same, "losses": apart(train(second), expected)}


def parallel(tensor_parallel):
    return settings(0, LADDER, tensor_parallel=tensor_parallel)


def refused():
    """What stops an engine before it changes the model, by case."""
    pipeline = deepspeed.pipe.PipelineModule([torch.nn.Linear(8, 8)], num_stages=1)
    cases = {
        "unknown": (stock(), {"laddr_residual": {}}),
        "field": (stock(), {"ladder_residual": {"layer": "all"}}),
        "auto": (stock(), {"ladder_residual": {"layers": "auto"}}),
        "shape": (stock(), {"ladder_residual": True}),
        "empty": (stock(), {"apply_to": "all"}),
        "apply_to": (stock(), LADDER | {"apply_to": "train"}),
        "kv_init": (stock(), LADDER | {"kv_init": "mean"}),
        "none": (stock(), {"ladder_residual": {"layers": "none"}}),
        "factor": (stock(), {"cross_layer_attention": {"sharing_factor": 5}}),
        "ranks": (stock(), {"desync_residual": {}}),
        "rank heads": (stock(), {"desync_residual": {"ranks": 4}}),
        "pattern": (stock(), {"desync_residual": {"pattern": "00,01,00,01,00", "ranks": 2}}),
        "model": (torch.nn.Linear(8, 8), LADDER),
        "pipeline": (pipeline, LADDER),
    }
    if dist.get_world_size() > 1:
        cut = {"autotp_size": 2}
        plan = {"layer_specs": [{"patterns": [".*o_proj.weight$"], "partition_type": "row"}]}
        adapted = stock()
        adapted.peft_config = {}
        one_head = stock(LlamaConfig(**SIZES | {"num_key_value_heads": 1}))
        cases = {
            "desync": (stock(), settings(0, DESYNC, tensor_parallel=cut)),
            "preset": (stock(), parallel(cut | {"preset_model": "llama"})),
            "plan": (stock(), parallel(cut | {"partition_config": plan})),
            "heads": (one_head, parallel(cut)),
            "adapters": (adapted, parallel(cut)),
        }
    messages = {}
    for name, (model, section) in cases.items():
        kind = type(model)
        json_file = section if "optimizer" in section else settings(0, section)
        try:
            build(0, section, model, config=json_file)
        except ConfigError as error:
            messages[name] = str(error)
        assert type(model) is kind
    return messages


def other_functions(folder):
    """Checkpoints loaded into models of another function."""
    plain_model = build(1, LADDER, stock(), config=without_section())
    messages = {}
    try:
        plain_model.load_checkpoint(str(folder / "ladder-1"))
    except ConfigError as error:
        messages["lost"] = str(error)
    plain_model.load_checkpoint(str(folder / "ladder-1"), load_module_only=True)
    engine = build(1, LADDER, stock(), config=settings(1, {"ladder_residual": {"layers": "0"}}))
    try:
        engine.load_checkpoint(str(folder / "ladder-1"))
    except ConfigError as error:
        messages["changed"] = str(error)
    plain_model = build(1, LADDER, stock(), config=without_section())
    plain_model.save_checkpoint(str(folder / "standard"))
    build(1, LADDER, stock()).load_checkpoint(str(folder / "standard"))
    return messages


def universal(place):
    """How far a run that goes on from a universal checkpoint ends from the straight one, and
    whether the checkpoint says what it is a checkpoint of."""
    engine = build(1, BOTH, stock(QWEN3))
    engine.load_checkpoint(str(place), tag="half")
    train(engine, first=STOP)
    straight = parameters(engine)
    if dist.get_rank() == 0:
        options = {
            "input_folder": str(place / "half"),
            "output_folder": str(place / "whole"),
            "num_extract_workers": 1,
            "num_merge_workers": 1,
            "keep_temp_folder": False,
            "strict": True,
            "inject_missing_state": True,
        }
        ds_to_universal.main(SimpleNamespace(**options))
    dist.barrier()
    json_file = settings(1, BOTH, checkpoint={"load_universal": True})
    engine = build(1, BOTH, stock(QWEN3, seed=8), config=json_file)
    engine.load_checkpoint(str(place), tag="whole")
    train(engine, first=STOP)
    state = read(place / "whole" / "mp_rank_00_model_states.pt")
    return {"parameters": apart(parameters(engine), straight), "record": "plugin_decoder" in state}


def without_section():
    json_file = settings(1, {})
    del json_file["deepspeed_plugins"]
    return json_file


def main(record, folder):
    warnings.simplefilter("ignore")
    torch._dynamo.config.disable = True  # Muon would compile for longer than all else takes
    deepspeed.init_distributed("gloo")
    result = {"refused": refused()}
    if dist.get_world_size() == 1:
        result |= {"torch": against_torch(folder, ["ladder"])}
        result |= {"optimizers": optimizers(), "left alone": left_alone(), "again": again()}
        result |= {"other functions": other_functions(folder)}
    else:
        result |= {"torch": against_torch(folder, FEATURES)}
        result |= {"partitioned": partitioned(folder), "universal": universal(folder / "both-1")}
        result |= {"muon": muon(folder)}
    if dist.get_rank() == 0:
        record.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
