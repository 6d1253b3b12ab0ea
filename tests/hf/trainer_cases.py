"""Power LR under Trainer and accelerate, on real processes; test_power_trainer.py starts this.

Writes the rate of every optimizer step, by case, to record.json in the folder given. Nothing here
arms the plugins, as in a user's script.
"""

import json
import sys

import deepspeed
import deepspeed.ops
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from torch_plugins.config import ConfigError

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

LENGTH, STEPS, STOP = 16, 8, 3
"""Tokens of a sequence; optimizer steps, and how many of them before a checkpoint."""
KWARGS = {"sequence_length": LENGTH, "decay_num_steps": 3, "decay_style": "linear"}
SCHEDULER = {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_max_lr": "auto"}
AUTO = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}


class Pieces(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(61, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Rates(TrainerCallback):
    """The rate of every optimizer step, as it begins."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(float(optimizer.param_groups[0]["lr"]))


def train(folder, resume=None, **changes):
    """Rates and final parameters of a run."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "max_steps": STEPS,
        "save_steps": STOP,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(folder, **{**settings, **changes})
    rates = Rates()
    model = LlamaForCausalLM(config)
    trainer = Trainer(model, arguments, train_dataset=Pieces(), callbacks=[rates])
    trainer.train(resume_from_checkpoint=resume)
    every = list(model.parameters())
    with deepspeed.zero.GatheredParameters(every, enabled=hasattr(every[0], "ds_id")):
        return rates.seen, [parameter.detach().clone() for parameter in every]


def both(folder, **changes):
    """Rates of a run, those of one that resumed it, and whether they end alike."""
    straight, parameters = train(folder, **changes)
    resumed, again = train(folder, resume=f"{folder}/checkpoint-{STOP}", **changes)
    pairs = zip(parameters, again, strict=True)
    return [straight, resumed, all(torch.equal(one, other) for one, other in pairs)]


def accelerated(**options):
    """Kind of process group, and tokens that a prepared scheduler counted over three optimizer
    steps of two micro-batches."""
    from torch_plugins.power_lr import PowerLR

    accelerator = Accelerator(gradient_accumulation_steps=2, **options)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = PowerLR(optimizer, batch_size=4, sequence_length=LENGTH)
    loader = DataLoader(torch.ones(12, 2), batch_size=1)
    prepared = accelerator.prepare(model, optimizer, loader, scheduler)
    model, optimizer, loader, scheduler = prepared
    for inputs in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return [accelerator.distributed_type.value, scheduler.scheduler.tokens]


def refused(folder):
    """What a JSON with a scheduler of its own beside "power" leads to."""
    section = {**AUTO, "zero_optimization": {"stage": 0}, "scheduler": {"type": "WarmupLR"}}
    try:
        TrainingArguments(folder, lr_scheduler_type="power", deepspeed=section, use_cpu=True)
    except ConfigError as error:
        return str(error)


def main(folder):
    tokens = [accelerated(cpu=True)]
    power = {"lr_scheduler_type": "power", "lr_scheduler_kwargs": KWARGS}
    scheduler = {"type": "PowerLR", "params": {**KWARGS, **SCHEDULER}}
    stages = [{**AUTO, "zero_optimization": {"stage": stage}} for stage in (1, 3)]
    cases = {
        "Trainer": power,
        "Trainer, split batches": {
            "per_device_train_batch_size": 4,
            "accelerator_config": {"split_batches": True},
            **power,
        },
        "auto, ZeRO 1": {
            "deepspeed": {**stages[0], "optimizer": OPTIMIZER, "scheduler": scheduler}
        },
        "auto, Trainer's optimizer, ZeRO 3": {"deepspeed": {**stages[1], "scheduler": scheduler}},
        "JSON without scheduler": {"deepspeed": {**stages[0], "optimizer": OPTIMIZER}, **power},
        "JSON with neither": {"deepspeed": stages[0], **power},
    }
    rates = {name: both(f"{folder}/{name}", **changes) for name, changes in cases.items()}
    zero = {"deepspeed": {**stages[0], "gradient_accumulation_steps": 2}, "use_cpu": True}
    plugin = TrainingArguments(folder, gradient_accumulation_steps=2, **zero).deepspeed_plugin
    tokens.append(accelerated(deepspeed_plugin=plugin))
    result = {"rates": rates, "tokens": tokens, "refused": refused(folder)}
    if torch.distributed.get_rank() == 0:
        with open(f"{folder}/record.json", "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
