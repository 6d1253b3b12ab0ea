"""Hugging Face's Trainer, given a JSON and nothing else: this script knows nothing of the plugins.

Started by test_conversion.py; writes what happened to the JSON file given.
"""

import json
import sys
from pathlib import Path

import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SECTION = {
    "ladder_residual": {"layers": "last:3"},
    "cross_layer_attention": {"sharing_factor": 2, "kv_norm": "separate"},
}
CASES = {
    "ZeRO 3, optimizer of the JSON": (3, True),
    "ZeRO 2, optimizer of the Trainer": (2, False),
}
STEPS, STOP = 4, 2


class Pieces(torch.utils.data.Dataset):
    def __init__(self):
        self.data = torch.randint(0, 61, (16, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {"input_ids": self.data[index], "labels": self.data[index]}


def model():
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def trainer(folder, stage, json_optimizer, **sections):
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "deepspeed_plugins": SECTION,
        **sections,
    }
    if json_optimizer:
        adamw = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        settings["optimizer"] = {"type": "AdamW", "params": adamw | {"torch_adam": True}}
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=settings,
        max_steps=STEPS,
        save_steps=STOP,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        weight_decay=0.1,
        gradient_checkpointing=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    pieces = Pieces()
    return Trainer(model(), arguments, train_dataset=pieces, eval_dataset=pieces)


def case(folder, stage, json_optimizer):
    """Losses on all data of the trained model and of a run that goes on from its middle."""
    one = trainer(folder, stage, json_optimizer)
    one.train()
    one.save_model(folder / "saved")
    AcceleratorState._reset_state(True)
    other = trainer(folder / "resumed", stage, json_optimizer)
    other.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}"))
    losses = [each.evaluate()["eval_loss"] for each in (one, other)]
    AcceleratorState._reset_state(True)
    return {"losses": losses, "class": type(one.model).__name__, "folder": str(folder)}


def main(record, folder):
    result = {name: case(folder / str(stage), stage, own) for name, (stage, own) in CASES.items()}
    if dist.get_rank() == 0:
        record.write_text(json.dumps(result))


if __name__ == "__main__":
    from engines import leave

    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
