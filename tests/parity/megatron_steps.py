"""Train models through Megatron's own ``train_step`` on two tensor-parallel ranks.

    train("--save", folder, processes=2, script=MEGATRON_STEPS, environment={"BATCHES": file})

For every case of deepspeed_table.py, ``--save/NAME`` gets three checkpoints, so that tensors come
whole and under the exporter's names: iteration 1 the first weights, 2 in their place the gradients
of the first step, 3 the weights after the second step. ``--save/record.json`` has the numbers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "megatron"))
sys.path.append(str(Path(__file__).parents[2]))

import torch
import train_gpt
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import get_model_config
from megatron.training import global_vars, training
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import save_checkpoint
from torch import Tensor, nn

from tests.parity.deepspeed_table import CASES, SEQUENCE, Case, command


@torch.no_grad()
def draw(model: nn.Module, std: float) -> None:
    """Weights large enough for every part to matter; what is replicated is one on all ranks. A norm
    of keys and values starts as a copy of its layer's, as a conversion makes it, and clips where
    the settings say."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    own, common = (torch.Generator().manual_seed(seed) for seed in (rank + 1, 100))
    for name, parameter in model.named_parameters():
        if ".input_quantizer." in name:
            continue
        shard = getattr(parameter, "tensor_model_parallel", False)
        value = torch.randn(parameter.shape, generator=own if shard else common)
        one = parameter.dim() == 1 and "norm" in name
        parameter.copy_(1 + 0.3 * value if one else std * value)
    for layer in model.decoder.layers:
        norm = getattr(layer.self_attention, "kv_norm", None)
        if norm is not None:
            norm.weight.copy_(layer.input_layernorm.weight)


def microbatches(tokens: Tensor) -> Any:
    """What Megatron's loader would give of sequences ``[B, S + 1]``, two at a time."""
    for part in tokens.split(2):
        yield {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "loss_mask": torch.ones(2, SEQUENCE),
            "attention_mask": torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None],
            "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        }


@torch.no_grad()
def save_gradients(models: list[Any]) -> None:
    """Checkpoint 2: gradients in place of weights."""
    kept = []
    for parameter in models[0].parameters():
        kept.append(parameter.detach().clone())
        parameter.copy_(parameter.main_grad)
    save_checkpoint(2, models, None, None, 0)
    for parameter, value in zip(models[0].parameters(), kept, strict=True):
        parameter.copy_(value)


def before_first(optimizer: Any, action: Callable[[], None]) -> None:
    """Call ``action`` before the optimizer's first step."""
    step = optimizer.step

    def noted(*args: Any, **kwargs: Any) -> Any:
        optimizer.step = step
        action()
        return step(*args, **kwargs)

    optimizer.step = noted


def steps(case: Case, batches: Tensor) -> list[dict[str, Any]]:
    """Loss, gradient norm before clipping, and rates of every step."""
    models, optimizer, scheduler = training.setup_model_and_optimizer(
        model_provider_func=train_gpt.model_provider, model_type=ModelType.encoder_or_decoder
    )
    draw(models[0].module, case.std)
    save_checkpoint(1, models, None, None, 0)
    before_first(optimizer, lambda: save_gradients(models))
    config = get_model_config(models[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = training.finalize_model_grads
    seen = []
    for step, tokens in enumerate(batches[: case.steps]):
        rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
        losses, skipped, *_, norm, _, _ = training.train_step(
            train_gpt.forward_step,
            microbatches(tokens),
            models,
            optimizer,
            scheduler,
            config,
            get_forward_backward_func(),
            step,
        )
        assert not skipped
        seen.append({"loss": losses["lm loss"].item(), "norm": float(norm), "rates": rates})
        if step == 1:
            save_checkpoint(3, models, None, None, 0)
    return seen


def run(case: Case, base: list[str], folder: Path, batches: Tensor) -> list[dict[str, Any]]:
    sys.argv = [*base, *command(case), "--save", str(folder)]
    args = parse_args()
    if not hasattr(args, "null_tokenizer_eod_id"):  # 0.17 adds a token of its own
        args.vocab_size -= 1
    validate_args(args)
    global_vars.set_global_variables(args)
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(1)
    seen = steps(case, batches)
    parallel_state.destroy_model_parallel()
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    return seen


def main() -> None:
    base = sys.argv[: sys.argv.index("--save")]
    folder = Path(sys.argv[-1])
    torch.distributed.init_process_group("gloo")
    batches = torch.load(os.environ["BATCHES"])
    record = {name: run(case, base, folder / name, batches) for name, case in CASES.items()}
    if torch.distributed.get_rank() == 0:
        (folder / "record.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
