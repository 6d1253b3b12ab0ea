"""Two gloo processes through transformers' own tensor and pipeline parallelism."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from torch_plugins.auxiliary_loss import Scope, bind

WORKER = r'''
import sys
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import torch_plugins.hf
from torch_plugins.auxiliary_loss import Scope, bind

work = sys.argv[1]
ids = load_file(f"{work}/ids.safetensors")["ids"]
out = {}

def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def load(name, **parallel):
    """What ``from_pretrained(distributed_config=...)`` does, which itself asks for accelerate."""
    model = AutoModelForCausalLM.from_pretrained(f"{work}/{name}")
    config, _, mesh = model.prepare_distribute_model(DistributedConfig(**parallel))
    return model.maybe_distribute_model(model, config, mesh)

for name in ("ladder", "gpt", "cla"):
    model = load(name, tp_size=2)
    weights = dict(model.named_parameters())
    assert weights["model.layers.0.self_attn.q_proj.weight"].to_local().shape[0] == 12
    assert weights["model.layers.0.mlp.down_proj.weight"].to_local().shape[1] == 20
    result = model(ids, labels=ids)
    result.loss.backward()
    out[f"{name}.logits"] = whole(result.logits).detach()
    for key, parameter in weights.items():
        out[f"{name}.{key}"] = whole(parameter.grad)

for name in ("dense", "moe"):
    out[f"{name}.logits"] = load(name, pp_size=2).eval()(ids).logits.detach()
try:
    load("moe", tp_size=2)
except ValueError as error:
    assert "tp" in str(error), error
else:
    raise AssertionError("experts ran under tensor parallelism")

model = AutoModelForCausalLM.from_pretrained(f"{work}/moe").train()
scope = Scope()
bind(model, scope)
scope.scale = 1.0
rank = torch.distributed.get_rank()
model(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
for key, parameter in model.named_parameters():
    torch.distributed.all_reduce(parameter.grad)
    out[f"moe.{key}"] = parameter.grad / 2
if torch.distributed.get_rank() == 0:
    save_file({k: v.contiguous() for k, v in out.items()}, f"{work}/out.safetensors")
'''

GPT = {
    "normalization": "layernorm",
    "mlp_gated": False,
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "position_embedding_type": "learned_absolute",
    "ladder_residual": {"layers": "last:2"},
}

CLA = {
    "cross_layer_attention": {"sharing_factor": 3, "kv_norm": "separate"},
    "qk_norm": True,
    "ladder_residual": {"layers": "1-2"},
}

MOE = {
    "dense_moe": {
        "num_experts": 5,
        "attention_experts": 2,
        "gated": True,
        "mi_weight_mlp": 0.3,
        "mi_weight_attention": 0.2,
        "mi_reduction": "data-parallel",
    }
}
"""Each process has half of the tokens, and the mean of the scores is over all."""


@pytest.fixture
def run_worker(tmp_path):
    """Run the worker on two processes; returns what rank 0 saw."""

    def run(models, ids):
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
        save_file({"ids": ids}, tmp_path / "ids.safetensors")
        (tmp_path / "worker.py").write_text(WORKER)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        process = subprocess.run(
            [*command, str(tmp_path / "worker.py"), str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        return load_file(tmp_path / "out.safetensors")

    return run


def test_two_processes_equal_one(run_worker, make_model, tokens):
    models = {
        "ladder": make_model(ladder_residual={"layers": "all"}),
        "gpt": make_model(**GPT),
        "cla": make_model(**CLA),
        "dense": make_model(),
        "moe": make_model(**MOE),
    }
    out = run_worker(models, tokens())
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name in ("ladder", "gpt", "cla"):
        result = models[name](tokens(), labels=tokens())
        result.loss.backward()
        torch.testing.assert_close(out[f"{name}.logits"], result.logits, **close)
        for key, parameter in models[name].named_parameters():
            torch.testing.assert_close(out[f"{name}.{key}"], parameter.grad, **close)
    for name in ("dense", "moe"):
        torch.testing.assert_close(out[f"{name}.logits"], models[name](tokens()).logits, **close)
    scope = Scope()
    bind(models["moe"], scope)
    scope.scale = 1.0
    models["moe"].train()(tokens(), labels=tokens()).loss.backward()
    for key, parameter in models["moe"].named_parameters():
        torch.testing.assert_close(out[f"moe.{key}"], parameter.grad, **close)
