"""GPTQ of llm-compressor on a model folder, in an environment of its own: ``test_gptq_peer.py``.

    .matrix/llmcompressor/bin/python tests/hf/gptq_peer.py MODEL TOKENS.safetensors JOB.json

JOB.json: a list of ``{"group_size", "act_order", "output"}``. Each output is a safetensors file of
dequantized weights by the linear layer's name.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def quantize(model_folder: str, ids: torch.Tensor, group_size: int, act_order: bool) -> dict:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    strategy = "channel" if group_size == -1 else "group"
    weights = QuantizationArgs(
        num_bits=4,
        strategy=strategy,
        group_size=None if group_size == -1 else group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        dampening_frac=0.01,
        actorder="weight" if act_order else None,
    )
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        processor=tokenizer(model.config.vocab_size),
        num_calibration_samples=len(rows),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    return {
        name: module.weight.detach().clone().contiguous()
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Is asked for where tokens are given, and pads none."""
    core = Tokenizer(models.WordLevel({str(index): index for index in range(size)}, "0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="0", pad_token="0")


def main(model_folder: str, tokens: str, job: str) -> None:
    ids = load_file(tokens)["input_ids"]
    for one in json.loads(Path(job).read_text()):
        output = one.pop("output")
        save_file(quantize(model_folder, ids, **one), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
