"""Two gloo processes through transformers' own tensor and pipeline parallelism."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

WORKER = r'''
import sys
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import torch_plugins.hf

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

out["dense.logits"] = load("dense", pp_size=2)(ids).logits.detach()
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
    }
    out = run_worker(models, tokens())
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name in ("ladder", "gpt", "cla"):
        result = models[name](tokens(), labels=tokens())
        result.loss.backward()
        torch.testing.assert_close(out[f"{name}.logits"], result.logits, **close)
        for key, parameter in models[name].named_parameters():
            torch.testing.assert_close(out[f"{name}.{key}"], parameter.grad, **close)
    torch.testing.assert_close(out["dense.logits"], models["dense"](tokens()).logits, **close)
