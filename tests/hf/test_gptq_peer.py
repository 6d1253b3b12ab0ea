"""GPTQ against llm-compressor on the same model and tokens: codes, and errors of outputs.

``make gptq-check`` builds the environment that llm-compressor runs in, for it asks for other
versions of transformers and compressed-tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.hf.w4a4_models import ids, llama, save
from torch_plugins.w4a4.quantize import hessians, quantize_model

PEER = Path(__file__).parents[2] / ".matrix/llmcompressor/bin/python"
CASES = {
    "rows": (-1, False),
    "rows, by activation": (-1, True),
    "groups": (16, False),
    "groups, by activation": (16, True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not PEER.exists():
        pytest.skip("no environment with llm-compressor: run make gptq-check")
    return save(llama, None, tmp_path_factory.mktemp("peer") / "model")


@pytest.fixture(scope="module")
def peer(model):
    """llm-compressor's dequantized weights, by case."""
    work = model.parent
    save_file({"input_ids": ids()}, work / "tokens.safetensors")
    outputs = {name: str(work / f"{number}.safetensors") for number, name in enumerate(CASES)}
    jobs = [
        {"group_size": size, "act_order": order, "output": outputs[name]}
        for name, (size, order) in CASES.items()
    ]
    (work / "job.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "gptq_peer.py"
    done = subprocess.run(
        [PEER, script, model, work / "tokens.safetensors", work / "job.json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: load_file(output) for name, output in outputs.items()}


@pytest.fixture(scope="module")
def inputs(model):
    """``X^T X`` of every linear layer in the model before quantization."""
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    linears = {n: m for n, m in plain.named_modules() if n.endswith("_proj")}
    with torch.no_grad():
        sums = hessians(linears, [lambda: plain(input_ids=ids())])
    return {name: (linears[name].weight.detach(), sums[name]) for name in linears}


def error(weight, quantized, hessian):
    """``||(W - Q) X|| / ||W X||``."""
    energy = lambda w: ((w @ hessian) * w).sum()  # noqa: E731
    return float((energy(weight - quantized) / energy(weight)).sqrt())


@pytest.mark.parametrize("name", CASES)
def test_codes_and_errors_are_those_of_llm_compressor(model, peer, inputs, name):
    size, order = CASES[name]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours = quantize_model(plain, ids(), group_size=size, act_order=order)
    assert ours.keys() == peer[name].keys()
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    nearest = quantize_model(rounded, method="rtn", group_size=size)
    rows = []
    for linear, (weight, hessian) in inputs.items():
        both = ours[linear].dequantize(), peer[name][linear]
        same = (both[0] - both[1]).abs() < 1e-5 * weight.abs().max()
        errors = [error(weight, q, hessian) for q in (*both, nearest[linear].dequantize())]
        rows.append([float(same.double().mean()), *errors])
    share, own, theirs, rtn = torch.tensor(rows).T
    print(
        f"{name}: equal {share.mean():.4f} (lowest {share.min():.4f}); errors ours "
        f"{own.mean():.5f}, theirs {theirs.mean():.5f}, round to nearest {rtn.mean():.5f}"
    )
    assert own.mean() < 0.9 * rtn.mean()
    if name == "groups":  # whose scales llm-compressor takes before the first column, always
        assert abs(own.mean() / theirs.mean() - 1) < 0.03
    else:
        assert share[0] == 1  # the first layer's inputs are the same to the last place
        assert share.mean() > 0.97
        assert abs(own.mean() / theirs.mean() - 1) < 0.01
