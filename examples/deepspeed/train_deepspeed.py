"""A byte-level Llama trained by a bare ``deepspeed.initialize``: everything that a plugin changes
stands in the JSON.

    deepspeed train_deepspeed.py --deepspeed_config ../FEATURE/ds_config.json --text FILE --save out
"""

import argparse
from pathlib import Path

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(width: int, length: int) -> LlamaForCausalLM:
    """A Llama of four layers over bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="any file; its bytes are tokens")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--save", help="folder for a checkpoint at the end")
    parser.add_argument("--load", help="folder of a checkpoint to go on from")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    options = deepspeed.add_config_arguments(parser).parse_args()

    torch.manual_seed(0)
    model = build(options.width, options.sequence_length)
    engine, _, _, _ = deepspeed.initialize(options, model, model_parameters=model.parameters())
    if options.load:
        engine.load_checkpoint(options.load)
    data = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    length, batch = options.sequence_length, engine.train_micro_batch_size_per_gpu()
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    while engine.global_steps < options.steps:
        step = engine.global_steps
        for part in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed((step * 1000 + part) * ranks + rank)
            starts = torch.randint(len(data) - length, (batch,), generator=generator)
            tokens = torch.stack([data[start : start + length] for start in starts])
            tokens = tokens.to(engine.device)
            loss = engine(input_ids=tokens, labels=tokens).loss
            rate = engine.get_lr()[0]
            engine.backward(loss)
            engine.step()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1:4d}  lr {rate:.6f}  loss {loss.item():.4f}", flush=True)
    if options.save:
        engine.save_checkpoint(options.save)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
