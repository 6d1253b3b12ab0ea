"""Coordinate check of muP: do activations move by as much in a wide model as in a narrow one?

    python coordinate_check.py          # about a minute on two cores; writes coordinate_check.png

A small GPT of Megatron's is trained for some steps at several widths, with Megatron's own Adam and
one learning rate for all widths: once as it is (*standard*), once with ``--power-mup-preset``
(*muP*). After every step the same batch shows how far, on average over coordinates, attention
outputs, MLP outputs, the residual stream and the logits are from where they started. Under muP that
must not depend on the width; the printed exponent e, of a change that grows as ``width ** e``, is
then near 0. Only the logits of the first steps move less in a wide model: at first through the
head's initial values, whose part falls with the width, and later through what the head learns.

Everything runs in this process on the CPU; the flags are those of any launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_PLUGINS_CPU": "1"}
import torch
import torch.nn.functional as F
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import unwrap_model
from megatron.training import global_vars, training
from megatron.training.arguments import (
    core_transformer_config_from_args,
    parse_args,
    validate_args,
)

BASE_WIDTH, HEAD_DIM, LAYERS, BATCH, SEQUENCE, VOCABULARY = 64, 16, 2, 4, 64, 256
FLAGS = f"""
    --num-layers {LAYERS} --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}
    --micro-batch-size {BATCH} --global-batch-size {BATCH} --train-iters 1000
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 0.01 --lr-decay-style constant --adam-beta2 0.95 --weight-decay 0 --clip-grad 0
    --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --use-cpu-initialization
"""
ARMS = {
    "standard": "",
    "muP": f"--power-mup-preset powerlm-3b --mup-base-hidden-size {BASE_WIDTH}",
}
PLACES = ("attention", "mlp", "residual", "logits")

Changes = list[dict[str, float]]
"""By step: the mean absolute change at every place since the start."""


@contextlib.contextmanager
def megatron(flags: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Megatron's model (wrapped for data parallelism) and optimizer for a command line."""
    with contextlib.redirect_stdout(io.StringIO()):
        sys.argv = ["coordinate_check", *flags]
        args = parse_args()
        validate_args(args)
        global_vars.set_global_variables(args, build_tokenizer=False)
        torch.manual_seed(0)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        [chunk], optimizer, _ = training.setup_model_and_optimizer(
            model_provider_func=model_provider, model_type=ModelType.encoder_or_decoder
        )
    yield chunk, optimizer
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()


def model_provider(*args: Any, **kwargs: Any) -> GPTModel:
    config = core_transformer_config_from_args(global_vars.get_args())
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def watch(model: GPTModel) -> dict[str, list[torch.Tensor]]:
    """What every forward pass appends its activations to, by place."""
    seen: dict[str, list[torch.Tensor]] = {place: [] for place in PLACES}

    def note(module: torch.nn.Module, place: str) -> None:
        module.register_forward_hook(lambda *call: seen[place].append(call[-1][0].detach()))

    for layer in model.decoder.layers:
        note(layer.self_attention, "attention")
        note(layer.mlp, "mlp")
        note(layer, "residual")
    return seen


def measure(width: int, arm: str, steps: int) -> Changes:
    """Train a model of the given width on one batch; its changes after each step."""
    shape = f"--hidden-size {width} --ffn-hidden-size {2 * width} "
    shape += f"--num-attention-heads {width // HEAD_DIM} "
    tokens = torch.randint(
        VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1)
    )
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    future = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    changes: Changes = []
    with megatron(shlex.split(FLAGS + shape + ARMS[arm])) as (chunk, optimizer):
        model = unwrap_model([chunk])[0]
        seen, start = watch(model), {}
        for step in range(steps + 1):
            optimizer.zero_grad()
            chunk.zero_grad_buffer()
            logits = model(tokens[:, :-1], positions, future)
            seen["logits"].append(logits.detach())
            now = {place: torch.stack(activations) for place, activations in seen.items()}
            start = start or now
            if step:
                moved = {place: now[place] - start[place] for place in PLACES}
                changes.append({place: x.abs().mean().item() for place, x in moved.items()})
            for activations in seen.values():
                activations.clear()
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            chunk.finish_grad_sync()
            optimizer.step()
    return changes


def exponent(widths: Sequence[int], values: Sequence[float]) -> float:
    """e of the least-squares fit ``value ~ width ** e``."""
    x = torch.tensor([math.log(width) for width in widths], dtype=torch.float64)
    y = torch.tensor([math.log(value) for value in values], dtype=torch.float64)
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def table(results: dict[str, dict[int, Changes]], steps: int) -> str:
    """Exponents of the change after the last step, by arm and place."""
    lines = [f"exponent of the change after {steps} steps"]
    lines.append(" " * 10 + "".join(f"{place:>11}" for place in PLACES))
    for arm, by_width in results.items():
        row = f"{arm:10}"
        for place in PLACES:
            last = [changes[-1][place] for changes in by_width.values()]
            row += f"{exponent(list(by_width), last):>+11.2f}"
        lines.append(row)
    return "\n".join(lines)


def plot(results: dict[str, dict[int, Changes]], path: Path) -> None:
    """One row an arm, one column a place; a line a step, over the width."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(PLACES), figsize=(11, 5), dpi=80, sharex=True, sharey="col", layout="constrained"
    )
    for row, (arm, by_width) in zip(axes, results.items(), strict=True):
        widths = list(by_width)
        steps = len(by_width[widths[0]])
        for axis, place in zip(row, PLACES, strict=True):
            for step in range(steps):
                values = [changes[step][place] for changes in by_width.values()]
                colour = plt.get_cmap("viridis")(step / max(1, steps - 1) * 0.9)
                label = f"step {step + 1}" if step in (0, steps - 1) else None
                axis.plot(widths, values, color=colour, marker="o", markersize=3, label=label)
            axis.set(xscale="log", yscale="log", xticks=widths, xticklabels=widths, title=place)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{arm}\nmean |change|")
    axes[0][0].legend(frameon=False)
    figure.supxlabel("width")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Coordinate check of muP on Megatron's GPT")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, default=8)
    default = Path(__file__).with_name("coordinate_check.png")
    parser.add_argument("--output", type=Path, default=default, help="the picture")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    results: dict[str, dict[int, Changes]] = {}
    for arm in ARMS:
        results[arm] = {}
        for width in options.widths:
            print(f"{arm}, width {width}", flush=True)
            results[arm][width] = measure(width, arm, options.steps)
    torch.distributed.destroy_process_group()
    plot(results, options.output)
    print(table(results, options.steps), f"wrote {options.output}", sep="\n")


if __name__ == "__main__":
    main()
