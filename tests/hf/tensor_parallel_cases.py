"""Decoders that transformers divides over processes; test_tensor_parallel.py starts this.

Everything is loaded from folders alone, our packages cannot be imported. Rank 0 writes what each
model computed to out.safetensors in the folder given, and what happened to record.json.
"""

import json
import os
import sys
from pathlib import Path


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch_plugins", "megatron_plugins", "deepspeed_plugins"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


RANK, work = int(os.environ["RANK"]), Path(sys.argv[1])
os.environ["HF_MODULES_CACHE"] = str(work / f"modules-{RANK}")
sys.meta_path.insert(0, Blocked())
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import _functional_collectives as collectives
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

PROMPT, STEPS = 5, 2


def load(name):
    return AutoModelForCausalLM.from_pretrained(work / name, trust_remote_code=True, tp_plan="auto")


def cached(model, ids, cache=None):
    """Logits of a prompt, and of the tokens behind it one at a time."""
    cache = cache or DynamicCache(config=model.config)
    parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    return [model(part, past_key_values=cache, use_cache=True).logits for part in parts]


def computed(model, ids, mask):
    """What is compared with one process."""
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    with torch.inference_mode():
        seen = {
            "logits": model(ids, attention_mask=mask).logits,
            "cached": torch.cat(cached(model, ids), dim=1),
            "generated": model.generate(ids, **options),
            "static": model.generate(
                ids, cache_implementation="static", disable_compile=True, **options
            ),
        }
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return seen | {"states": torch.stack(states)}


class Link:
    """Functional all-reduces whose sums arrive when they are waited for, NaN until then, and a
    record of what happened: modules that start and are done, all-reduces, waits. Module 2 l is the
    attention of layer l, and 2 l + 1 its MLP."""

    def __init__(self, model):
        self.events, self.flying, self.module = [], {}, None
        self.all_reduce, self.wait_tensor = collectives.all_reduce, collectives.wait_tensor
        for index, layer in enumerate(model.model.layers):
            parts = ((layer.self_attn, layer.self_attn.o_proj), (layer.mlp, layer.mlp.down_proj))
            for n, (module, last) in enumerate(parts, 2 * index):
                module.register_forward_pre_hook(lambda *_, n=n: self.start(n))
                last.register_forward_hook(lambda *_, n=n: self.events.append(f"done {n}"))

    def start(self, n):
        self.module = n
        self.events.append(f"start {n}")

    def launch(self, partial_sums, reduceOp, group, **options):
        if self.module is None:  # of the embedding
            return self.all_reduce(partial_sums, reduceOp, group, **options)
        total, buffer = partial_sums.clone(), torch.full_like(partial_sums, float("nan"))
        dist.all_reduce(total, group=group)
        self.events.append(f"launch {self.module}")
        self.flying[buffer.untyped_storage().data_ptr()] = buffer, total, self.module
        return collectives.AsyncCollectiveTensor(buffer)

    def wait(self, tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in self.flying:
            return self.wait_tensor(tensor)
        buffer, total, module = self.flying.pop(key)
        buffer.copy_(total)
        self.events.append(f"wait {module}")
        return tensor

    def __enter__(self):
        collectives.all_reduce, collectives.wait_tensor = self.launch, self.wait
        return self

    def __exit__(self, *_):
        collectives.all_reduce, collectives.wait_tensor = self.all_reduce, self.wait_tensor

    def __call__(self, run):
        """Events of ``run()``, and its result."""
        self.events, self.module = [], None
        return self.events, run()


@torch.no_grad()
def in_flight(model, ids):
    """Events of a prompt and of one token behind it; whether the logits stay what they are."""
    expected = cached(model, ids)
    with Link(model) as link:
        cache = DynamicCache(config=model.config)
        prompt, token = ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 1]
        prefill, first = link(lambda: model(prompt, past_key_values=cache).logits)
        decode, second = link(lambda: model(token, past_key_values=cache).logits)
    same = torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    return {"prefill": prefill, "decode": decode, "bitwise": same, "left": len(link.flying)}


def told(graph):
    """Matrix products and collectives of a graph; a wait with the place of its all-reduce."""
    names, launched = [], []
    for node in graph.nodes:
        target = str(node.target)
        if "all_reduce" in target:
            launched.append(node)
            names.append(f"launch {len(launched) - 1}")
        elif "wait_tensor" in target and node.args[0] in launched:
            names.append(f"wait {launched.index(node.args[0])}")
        elif "mm." in target:
            names.append("product")
    return names


@torch.no_grad()
def compiled(model, ids):
    """A decoder compiled whole: its graph as torch traced it, and after the inductor's passes."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import detect_fake_mode
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.virtualized import V

    graphs = {}

    def passes(graph_module, _):
        graphs["traced"] = told(graph_module.graph)
        values = [node.meta.get("val") for node in graph_module.graph.nodes]
        with V.set_fake_mode(detect_fake_mode(values)):
            post_grad_passes(graph_module, True)
        graphs["passes"] = told(graph_module.graph)
        graph_module.recompile()
        return graph_module.forward

    backend = aot_autograd(fw_compiler=passes, inference_compiler=passes)
    run = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    logits, apart = run(ids, use_cache=False).logits, []
    apart.append((logits - model(ids, use_cache=False).logits).abs().max().item())
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    for one, other in zip(*map(cached, (run, model), (ids, ids), caches), strict=True):
        apart.append((one - other).abs().max().item())
    return graphs | {"apart": max(apart)}


def refusal(name):
    try:
        load(name)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    given = load_file(work / "given.safetensors")
    ids, mask = given["ids"], given["mask"]
    plan = json.loads((work / "plan.json").read_text())
    out, record = {}, {"refused": {name: refusal(name) for name in plan["refused"]}}
    for name in plan["models"]:
        model = load(name)
        out |= {f"{name}.{key}": value for key, value in computed(model, ids, mask).items()}
        if name in plan["compiled"]:
            record[f"{name} compiled"] = compiled(load(name), ids)
        record[name] = in_flight(load(name), ids)  # another: a watched layer hands nothing over
    ours = [m for m in sys.modules if m.startswith(("torch_plugins", "megatron_plugins"))]
    if RANK == 0:
        save_file({k: v.contiguous() for k, v in out.items()}, work / "out.safetensors")
        (work / "record.json").write_text(json.dumps(record | {"ours": ours}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
