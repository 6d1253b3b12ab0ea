"""Ladders of hybrid stacks against the recurrence written out, and against a GPT's ladder.

As ladder_cases.py, whose cases serve for hybrid models too. Mamba's kernels need a GPU: a layer of
the same interface stands in its place.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_plugins.hybrid_specs import local_stack_spec
from tests.megatron import ladder_cases
from tests.megatron.hybrid_table import AGAINST_GPT, AGAINST_RECURRENCE, PATTERN
from tests.megatron.hybrid_upstream import STACK, HybridModel
from tests.megatron.ladder_cases import backward, difference, gradients, inputs, pair
from tests.megatron.ladder_table import FULL, GPT, RECOMPUTED_NORM, SEQUENCE, SP, VOCAB
from torch_plugins.config import ConfigError, DenseMoE, LadderResidual, PowerLR

gpt = ladder_cases.build


class Mixer(MegatronModule):
    """A layer that is no TransformerLayer: ``x + tanh(x W)``, W the same in every process."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.weight = torch.nn.Parameter(torch.eye(config.hidden_size) / layer_number)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states + torch.tanh(hidden_states @ self.weight)


SPEC = replace(
    local_stack_spec,
    submodules=replace(local_stack_spec.submodules, mamba_layer=ModuleSpec(Mixer)),
)


def hybrid(
    ladder: str | None, multiplier: float = 1, pattern: str = PATTERN, **options: Any
) -> Any:
    """A hybrid model with the given ladder layers, or the stock one."""
    config = TransformerConfig(**{**GPT, "num_layers": len(pattern), **options})
    if ladder is not None:
        config.megatron_plugins = {"ladder_residual": LadderResidual(ladder)}
    return ladder_cases.scrambled(of(config, pattern))


def of(config: TransformerConfig, pattern: str, spec: ModuleSpec = SPEC) -> Any:
    return HybridModel(
        config=config,
        vocab_size=VOCAB,
        max_sequence_length=32,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **{STACK: spec},
    )


def recurrence(model: Any, ladder: str, multiplier: float = 1) -> Tensor:
    """Logits [b, s, v] by ``x_{i+1} = x_i + h_{i+1}(x_{i-1})``, out of a stock model's modules; a
    layer outside the ladder reads ``x_i``."""
    tokens, positions, mask = inputs()
    fp32_residual = model.config.fp32_residual_connection
    x = before = model.embedding(input_ids=tokens, position_ids=positions)
    for index, (symbol, layer) in enumerate(
        zip(model.decoder.layer_type_list, model.decoder.layers, strict=True)
    ):
        read = before if index in LadderResidual(ladder).resolve(model.config.num_layers) else x
        if symbol == "M":
            x = before = layer(read)
            continue
        if symbol == "*":
            rope = model.rotary_pos_emb(SEQUENCE)
            output, bias = layer.self_attention(
                layer.input_layernorm(read), attention_mask=mask, rotary_pos_emb=rope
            )
        else:
            output, bias = layer.mlp(layer.pre_mlp_layernorm(read))
        x, before = x.float() if fp32_residual else x, x
        output = output.to(x.dtype)
        x = x + (output if bias is None else output + bias.to(x.dtype))
    logits, _ = model.output_layer(model.decoder.final_norm(x))
    return logits.transpose(0, 1)


def of_gpt(name: str) -> str:
    """The stack's name of a GPT's weight: ``decoder.layers.1.mlp`` is ``decoder.layers.3.mlp``."""
    if not name.startswith("decoder.layers."):
        return name.replace("final_layernorm", "final_norm")
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    mlp = rest.startswith(("mlp", "pre_mlp"))
    return f"decoder.layers.{2 * int(layer) + mlp}.{rest}"


def against_gpt(gpt_ladder: str, ladder: str, options: dict[str, Any]) -> dict[str, Any]:
    pattern = "*E" * 4 if "num_moe_experts" in options else PATTERN
    torch.manual_seed(0)
    expected = gpt(gpt_ladder, **options)
    model = hybrid(ladder, pattern=pattern, **options)
    weights = {of_gpt(name): value for name, value in expected.state_dict().items()}
    model.load_state_dict(weights)
    A, B = model(*inputs()), expected(*inputs())
    backward(A)
    backward(B)
    stock = hybrid(None, pattern=pattern, **options)
    stock.load_state_dict(weights)
    return {
        "logits": (A - B).abs().max().item() / B.abs().max().item(),
        "gradients": difference(
            gradients(model), {of_gpt(name): grad for name, grad in gradients(expected).items()}
        ),
        "from standard": (A - stock(*inputs())).abs().max().item() / B.abs().max().item(),
    }


def order(**options: Any) -> dict[str, Any]:
    """What happens in a forward and its backward, in order; and in a GPT of the same modules."""
    stack = ladder_cases.order(**options)
    ladder_cases.build = gpt
    expected = ladder_cases.order(**options)
    ladder_cases.build = hybrid
    return {"stack": stack, "gpt": expected}


def interrupted() -> dict[str, Any]:
    """A forward that stopped halfway leaves nothing for the next one."""
    model, _ = pair("all")
    A = model(*inputs())
    handle = model.decoder.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(*inputs())
    except ZeroDivisionError:
        handle.remove()
    return {"logits": (model(*inputs()) - A).abs().max().item()}


def refused() -> dict[str, Any]:
    """Errors of stacks that are built without Megatron's arguments."""
    ladder = LadderResidual()
    models: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "feature": (DenseMoE(num_experts=2), PATTERN, {}),
        "mamba": (LadderResidual("4-6"), "*-*M*-*-", {}),
        "absent": (ladder, "*-*G*-*-", {}),
        "nothing": (LadderResidual("0"), PATTERN, {}),
        "number": (ladder, PATTERN, {"num_layers": 7}),
    }
    errors = {}
    for name, (feature, pattern, options) in models.items():
        config = TransformerConfig(**{**GPT, "num_layers": len(pattern), **options})
        config.megatron_plugins = {feature.key(): feature}
        try:
            of(config, pattern)
        except ConfigError as error:
            errors[name] = str(error)
    config = TransformerConfig(**GPT)
    config.megatron_plugins = {ladder.key(): ladder}
    upstream = replace(SPEC, module=local_stack_spec.module.__base__)
    try:
        of(config, "*-G-", upstream)
    except ConfigError as error:
        errors["slot"] = str(error)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        build_module(SPEC, config, layer_type_list=["*"], pg_collection=groups, is_mtp_layer=True)
    except ConfigError as error:
        errors["prediction"] = str(error)
    config.megatron_plugins = {PowerLR.key(): PowerLR()}
    stack = build_module(
        SPEC, config, layer_type_list=["*"], pg_collection=groups, is_mtp_layer=True
    )
    errors["schedule"] = type(stack.layers[0]).__name__
    return errors


def main(output: str) -> None:
    ladder_cases.start()
    ladder_cases.build, ladder_cases.recurrence = hybrid, recurrence
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(ladder_cases.against_recurrence, *case)
        for name, case in AGAINST_RECURRENCE.items()
    }
    gpts = {
        f"gpt {name}": functools.partial(against_gpt, *case) for name, case in AGAINST_GPT.items()
    }
    cases |= {name: case for name, case in gpts.items() if " tp1" not in name}
    cases |= {
        "dropout": ladder_cases.dropout,
        "late": ladder_cases.never_read_early,
        "late-sequence-parallel": lambda: ladder_cases.never_read_early(**SP),
        "order": order,
        "order-sequence-parallel": lambda: order(**SP),
        "order-recompute-norm": lambda: order(**SP, **RECOMPUTED_NORM),
        "collectives": ladder_cases.collectives,
        "collectives-recompute": lambda: ladder_cases.collectives(**FULL),
        "collectives-sequence-parallel": lambda: ladder_cases.collectives(**SP),
        "static-inference": ladder_cases.static_inference,
        "interrupted": interrupted,
        "refused": refused,
    }
    ladder_cases.write(output, cases, leave=False)
    parallel_state.destroy_model_parallel()
    ladder_cases.start(tensor_parallel_size=1)
    ladder_cases.write(output, {name: case for name, case in gpts.items() if " tp1" in name})


if __name__ == "__main__":
    main(sys.argv[1])
