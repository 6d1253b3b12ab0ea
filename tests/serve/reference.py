"""Write every family's folder and what transformers computes with it, in a process without vLLM.

    python -m tests.serve.reference FOLDER

FOLDER/<family>/ is an exported model; FOLDER/<family>.json holds the greedy tokens, and the
log-probabilities of the prompts under its configuration and under each control.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import torch_plugins.hf
from tests.serve.families import FAMILIES, VOCAB, Family
from torch_plugins.export.tokenizer import Tokenizer as ExportedTokenizer
from torch_plugins.export.writer import write_model

NEW_TOKENS = 16


def prompts() -> list[list[int]]:
    """Eight prompts of different lengths: 128 greedy tokens."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (n,), generator=draw).tolist() for n in range(5, 69, 8)]


def build(family: Family, folder: Path) -> None:
    """A model with weights so large, biases and norms too, that an error shows in the logits."""
    torch.manual_seed(0)
    config = torch_plugins.hf.PluginDecoderConfig(**family.config)
    model = torch_plugins.hf.PluginDecoderForCausalLM(config)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else 0.08
        parameter.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, spread)
    if not family.stock:
        model.save_pretrained(folder)
        return
    folder.mkdir()
    write_model(folder, config, State(model.state_dict()), ExportedTokenizer(), "5GB", print)


class State(dict[str, torch.Tensor]):
    """A state dict as the exporters want it."""

    def meta(self, name: str) -> torch.Tensor:
        return self[name].to("meta")


def tokenizer(folder: Path) -> None:
    """One character a token, for the server."""
    characters = [chr(33 + index) for index in range(VOCAB)]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="!"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="!").save_pretrained(folder)


@torch.no_grad()
def measure(folder: Path, control: dict[str, Any], generate: bool) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, **control)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    inputs = [torch.tensor([prompt]) for prompt in prompts()]
    result: dict[str, Any] = {
        "logprobs": [model(ids).logits[0, :-1].log_softmax(-1).tolist() for ids in inputs]
    }
    if generate:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        runs = [model.generate(ids, **options)[0, ids.shape[1] :] for ids in inputs]
        result["tokens"] = [tokens.tolist() for tokens in runs]
    return result


def main(work: Path) -> None:
    for name, family in FAMILIES.items():
        folder = work / name
        build(family, folder)
        tokenizer(folder)
        result = measure(folder, {}, generate=True)
        result["controls"] = [measure(folder, c, False)["logprobs"] for c in family.controls]
        result["prompts"] = prompts()
        (work / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
