"""Checkpoints of engines with W4A4, and models of transformers, for w4a4_cases.py."""

import copy
import sys

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from w4a4_net import SECTION, build, net, raised, settings, train, whole

from torch_plugins.w4a4.linear import fake_quant_linears


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
