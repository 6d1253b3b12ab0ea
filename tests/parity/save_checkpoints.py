"""Save many small models through Megatron's own ``save_checkpoint``, from one set of processes.

    train("--save", folder, processes=2, script=SAVE_CHECKPOINTS, environment={"CASES": json})

``CASES`` maps a name to the flags of its model, which come after those of the command line. Weights
are random and large enough for every part to matter: at Megatron's own start attention is nearly
uniform, norms are one and biases zero. With ``TRANSFORMER_ENGINE`` in the environment, the layers
are those of the TransformerEngine spec.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "megatron"))
if "TRANSFORMER_ENGINE" in os.environ:
    import te_layers  # noqa: F401  TransformerEngine, as far as a machine without a GPU can have it

import torch
import train_gpt
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import global_vars
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import save_checkpoint


def enlarge(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if ".input_quantizer." in name:
            side = -1 if name.endswith("low") else 1
            parameter.data = ((2 + 0.3 * value) * side).to(parameter)
        elif parameter.dim() == 1:
            parameter.data = (value * 0.3 + ("norm" in name and name.endswith("weight"))).to(
                parameter
            )
        else:
            parameter.data = (value * 0.15).to(parameter)


def save(name: str, flags: list[str], base: list[str], folder: Path) -> None:
    sys.argv = [*base, *flags, "--save", str(folder / name)]
    args = parse_args()
    validate_args(args)
    global_vars.set_global_variables(args)
    stages = args.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, stages
    )
    model_parallel_cuda_manual_seed(1)
    models = []
    for stage in range(stages or 1):
        first = parallel_state.is_pipeline_first_stage(False, stage if stages else None)
        last = parallel_state.is_pipeline_last_stage(False, stage if stages else None)
        model = train_gpt.model_provider(first, last, vp_stage=stage if stages else None)
        assert ("TERowParallel" in repr(model)) == ("TRANSFORMER_ENGINE" in os.environ)
        # Every shard its own; of what is replicated one copy is saved, whichever.
        enlarge(model, 100 * stage + torch.distributed.get_rank())
        models.append(Float16Module(model.config, model) if args.bf16 else model)
    save_checkpoint(1, models, None, None, 0)
    parallel_state.destroy_model_parallel()
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()


def transformer_engine_spec(qk_layernorm: bool, normalization: str) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)


def main() -> None:
    if "TRANSFORMER_ENGINE" in os.environ:
        train_gpt.get_gpt_layer_local_spec = transformer_engine_spec
    base = sys.argv[: sys.argv.index("--save")]
    folder = Path(sys.argv[-1])
    torch.distributed.init_process_group("gloo")
    for name, flags in json.loads(os.environ["CASES"]).items():
        save(name, flags, base, folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
