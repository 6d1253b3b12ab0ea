"""A byte-level Llama trained by Hugging Face's Trainer: everything that a plugin changes stands in
the arguments, or in a DeepSpeed JSON.

    python train_hf.py --text FILE --output_dir out --max_steps 100 \\
        --learning_rate 0.01 --lr_scheduler_type power \\
        --lr_scheduler_kwargs '{"sequence_length": 128, "decay_num_steps": 20}'

    python train_hf.py --text FILE --output_dir out --max_steps 100 --learning_rate 0.003 \\
        --per_device_train_batch_size 8 --deepspeed ../FEATURE/ds_config.json
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


@dataclass
class Data:
    text: str = field(metadata={"help": "any file; its bytes are tokens"})
    sequence_length: int = 128


class Bytes(torch.utils.data.Dataset):
    """Consecutive pieces of a file."""

    def __init__(self, data: Data) -> None:
        self.data = torch.frombuffer(bytearray(Path(data.text).read_bytes()), dtype=torch.uint8)
        self.length = data.sequence_length

    def __len__(self) -> int:
        return len(self.data) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.data[index * self.length : (index + 1) * self.length].long()
        return {"input_ids": piece, "labels": piece}


def main() -> None:
    data, arguments = HfArgumentParser((Data, TrainingArguments)).parse_args_into_dataclasses()
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=data.sequence_length,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Bytes(data))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
