"""TRL's preference tuning and PEFT's adapters, given a JSON and nothing else: this script knows
nothing of the plugins.

Started by test_alignment.py; writes what happened to the JSON file given.
"""

import json
import sys
import warnings
from pathlib import Path

import deepspeed
import peft
import torch
import torch.distributed as dist
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset
from engines import leave
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_cases import Pieces, model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

SECTION = {"ladder_residual": {"layers": "all"}, "cross_layer_attention": {"sharing_factor": 2}}
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
PREFERENCES = {
    "prompt": [f"w{i} w{i + 1}" for i in range(4)],
    "chosen": [f" w{i + 2} w{i + 3}" for i in range(4)],
    "rejected": [f" w{i + 5} w{i + 9}" for i in range(4)],
}


def tokenizer():
    words = ["pad", "eos", "unk", *(f"w{i}" for i in range(58))]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="unk"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "pad", "eos_token": "eos", "unk_token": "unk"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **special)


def settings(stage, **section):
    """JSON of a run."""
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "deepspeed_plugins": {**SECTION, **section},
    }


def equal(one, other):
    """Whether two models have the same parameters, wherever those lie."""
    whole = list(one.parameters())
    with deepspeed.zero.GatheredParameters(whole, enabled=hasattr(whole[0], "ds_id")):
        return all(map(torch.equal, whole, other.parameters()))


def preferences(folder, stage, **section):
    """Classes of policy and reference model, the reference's fate and the losses of a DPO run."""
    arguments = trl.DPOConfig(folder, deepspeed=settings(stage, **section), **COMMON)
    policy, reference = model(), model()
    trainer = trl.DPOTrainer(
        policy,
        reference,
        arguments,
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=tokenizer(),
    )
    trainer.train()
    trainer.save_model(folder)
    seen = {
        "policy": type(policy).__name__,
        "reference": type(reference).__name__,
        "untouched": equal(trainer.ref_model.module, model()) if not section else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    AcceleratorState._reset_state(True)
    return seen


def adapters(base, folder):
    """Losses of a Trainer run with LoRA on ``base``, and of what it makes of the base."""
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    before = [parameter.detach().clone() for parameter in adapted.parameters()]
    arguments = TrainingArguments(folder, deepspeed=settings(2), save_steps=2, **COMMON)
    trainer = Trainer(adapted, arguments, train_dataset=Pieces())
    trainer.train()
    data = Pieces().data
    moved = [
        "lora_" in name
        for (name, parameter), old in zip(adapted.named_parameters(), before, strict=True)
        if not torch.equal(parameter, old)
    ]
    trained = adapted(input_ids=data, labels=data).loss.item()
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    again = AutoModelForCausalLM.from_pretrained(folder / "merged")
    AcceleratorState._reset_state(True)
    return {
        "moved": len(moved),
        "only adapters": all(moved),
        "class": type(again).__name__,
        "losses": [trained, again(data, labels=data).loss.item()],
    }


def refused(folder):
    """What stops adapters on a model that is not converted, by way of starting the run."""
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    arguments = TrainingArguments(folder, deepspeed=settings(2), **COMMON)
    cut = settings(2) | {"tensor_parallel": {"autotp_size": 1}}
    ways = {
        "Trainer": lambda m: Trainer(m, arguments, train_dataset=Pieces()).train(),
        "initialize": lambda m: deepspeed.initialize(model=m, config=cut),
    }
    messages = {}
    for name, way in ways.items():
        try:
            way(peft.get_peft_model(model(), config))
        except ValueError as error:
            messages[name] = str(error)
        AcceleratorState._reset_state(True)
    return messages


def main(record, folder):
    warnings.simplefilter("ignore")
    result = {
        "ZeRO 2": preferences(folder / "dpo-2", 2),
        "ZeRO 3": preferences(folder / "dpo-3", 3),
        "all": preferences(folder / "all", 2, apply_to="all"),
    }
    base = AutoModelForCausalLM.from_pretrained(folder / "dpo-2")
    result |= {"adapters": adapters(base, folder / "lora"), "refused": refused(folder / "none")}
    if dist.get_rank() == 0:
        record.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
