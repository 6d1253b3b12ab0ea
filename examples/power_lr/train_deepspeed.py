"""A byte-level language model trained by a bare ``deepspeed.initialize``: everything that a plugin
changes stands in the JSON.

    deepspeed train_deepspeed.py --deepspeed_config ds_config.json --text FILE
"""

import argparse
from pathlib import Path

import deepspeed
import torch
from torch import nn
from torch.nn import functional as F


class ByteModel(nn.Module):
    """Two transformer layers over bytes; returns the loss."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
        hidden = self.layers(
            self.embed(inputs) + self.place, mask.to(inputs.device), is_causal=True
        )
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


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
    model = ByteModel(options.width, options.sequence_length)
    engine, _, _, _ = deepspeed.initialize(options, model, model_parameters=model.parameters())
    if options.load:
        engine.load_checkpoint(options.load)
    data = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    length, batch = options.sequence_length + 1, engine.train_micro_batch_size_per_gpu()
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    while engine.global_steps < options.steps:
        step = engine.global_steps
        for part in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed((step * 1000 + part) * ranks + rank)
            starts = torch.randint(len(data) - length, (batch,), generator=generator)
            tokens = torch.stack([data[start : start + length] for start in starts])
            loss = engine(tokens.to(engine.device))
            rate = engine.get_lr()[0]
            engine.backward(loss)
            engine.step()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1:4d}  lr {rate:.6f}  loss {loss.item():.4f}", flush=True)
    if options.save:
        engine.save_checkpoint(options.save)


if __name__ == "__main__":
    main()
