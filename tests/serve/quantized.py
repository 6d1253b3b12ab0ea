"""A model with four-bit weights for vLLM, and what transformers makes of vLLM's tokens.

    python -m tests.serve.quantized build WORK
    python -m tests.serve.quantized judge WORK

``build`` writes WORK/plain, WORK/w4a16 (of which every fifth scale is wrong in WORK/wrong) and
WORK/prompts.json. ``judge`` reads WORK/tokens.json, greedy tokens for each prompt, and writes
WORK/verdict.json: for each model the log-probabilities of the prompts, and the largest *regret*,
how much less likely than the likeliest a token is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.serve.families import TINY, VOCAB
from tests.serve.reference import prompts
from torch_plugins.w4a4.folder import Folder
from torch_plugins.w4a4.quantize import Recipe
from torch_plugins.w4a4.quantize_folder import Job, quantize_folder

MODELS = ("plain", "w4a16", "wrong")


def build(work: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else 0.08
        parameter.data.normal_(1.0 if "norm" in name else 0.0, spread)
    model.half().save_pretrained(work / "plain")
    ids = torch.randint(VOCAB, (32, 64), generator=torch.Generator().manual_seed(1))
    job = Job(Folder(work / "plain"), work / "w4a16", Recipe("gptq", "none", 32), ids)
    print(quantize_folder(job, print))
    shutil.copytree(work / "w4a16", work / "wrong")
    weights = work / "wrong/model.safetensors"
    tensors = load_file(weights)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name][:, ::5] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    (work / "prompts.json").write_text(json.dumps(prompts()))


@torch.no_grad()
def judge(work: Path) -> None:
    asked, answered = (json.loads((work / f).read_text()) for f in ("prompts.json", "tokens.json"))
    verdict: dict[str, Any] = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32).eval()
        regrets, logprobs = [], []
        for prompt, tokens in zip(asked, answered, strict=True):
            out = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            logprobs.append(out[: len(prompt) - 1].tolist())
            steps = out[len(prompt) - 1 : -1]
            regrets += (steps.amax(-1) - steps[range(len(tokens)), tokens]).tolist()
        verdict[name] = {"logprobs": logprobs, "regret": max(regrets)}
    (work / "verdict.json").write_text(json.dumps(verdict))


if __name__ == "__main__":
    {"build": build, "judge": judge}[sys.argv[1]](Path(sys.argv[2]))
