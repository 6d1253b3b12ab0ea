"""What the benchmark compares: Megatron's own models, standard, parallel, ladder and desync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One column of the benchmark."""

    name: str
    kind: str
    """standard, parallel (attention and MLP of a layer read the same, and are reduced as one),
    ladder, or desync (one all-reduce for every two layers)."""
    connected: bool = True
    """False: without communication, the bound."""
    synchronous: bool = False
    """True: every launch waits for its end at once."""


STANDARD = Variant("standard", "standard")
WAITING = Variant("standard, waiting at once", "standard", synchronous=True)
PARALLEL = Variant("parallel attention and MLP", "parallel")
DESYNC = Variant("desync 4x", "desync")
LADDER = Variant("ladder", "ladder")
CONTROL = Variant("ladder, waiting at once", "ladder", synchronous=True)
STANDARD_BOUND = Variant("standard, no communication", "standard", connected=False)
LADDER_BOUND = Variant("ladder, no communication", "ladder", connected=False)
BOUNDS = (STANDARD_BOUND, LADDER_BOUND)
OVER_A_LINK = (STANDARD, WAITING, PARALLEL, DESYNC, LADDER, CONTROL)


@dataclass(frozen=True)
class Shape:
    """The model and its input; the defaults reduce 1 MiB after each module."""

    layers: int = 4
    hidden_size: int = 512
    heads: int = 8
    ffn_hidden_size: int = 896
    """By default an MLP that computes about as long as an attention, which a ladder hides best
    under; Llama's is two to four times as long."""
    sequence_length: int = 128
    batch_size: int = 4

    @property
    def modules(self) -> int:
        return 2 * self.layers

    @property
    def message_bytes(self) -> int:
        """Of one all-reduce, in fp32."""
        return 4 * self.sequence_length * self.batch_size * self.hidden_size


def configuration(shape: Shape, kind: str, ranks: int, sequence_parallel: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn.functional import silu

    from megatron_plugins.features import adapter
    from torch_plugins.config import DesyncResidual, LadderResidual

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn_hidden_size,
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=silu,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    features = {"ladder": LadderResidual(), "desync": DesyncResidual("4x", ranks)}
    if kind in features:
        feature = features[kind]
        config.megatron_plugins = {feature.key(): feature}
        adapter(feature.key()).adjust_config(config, feature)
    return config


def layer_spec(kind: str) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if kind == "parallel":
        spec.module = parallel_layer()
    return spec


def parallel_layer() -> Any:
    """Megatron's layer as GPT-J and PaLM have it: ``x + attention(norm x) + MLP(norm x)``, with one
    all-reduce in the forward and one in the backward. Without sequence parallelism or bias."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_plugins.reduction import keep_partial_sums

    class ParallelLayer(TransformerLayer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for module in (self.self_attention.linear_proj, self.mlp.linear_fc2):
                keep_partial_sums(module)
            for module in (self.self_attention.linear_qkv, self.mlp.linear_fc1):
                module.allreduce_dgrad, module.disable_grad_reduce = False, True

        def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            group = self.pg_collection.tp
            x = copy_to_tensor_model_parallel_region(
                self.input_layernorm(hidden_states), group=group
            )
            taken = ("inference_context", "rotary_pos_emb", "sequence_len_offset")
            given = {name: kwargs[name] for name in taken if name in kwargs}
            attention, _ = self.self_attention(x, attention_mask=attention_mask, **given)
            mlp, _ = self.mlp(x)
            added = reduce_from_tensor_model_parallel_region(attention + mlp, group=group)
            return hidden_states + added, None

    return ParallelLayer


def build_block(shape: Shape, kind: str, ranks: int, sequence_parallel: bool = False) -> Any:
    """Megatron's transformer block of local layers."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    config = configuration(shape, kind, ranks, sequence_parallel)
    return checked(TransformerBlock(config, layer_spec(kind)), kind)


def build_model(shape: Shape, kind: str, ranks: int, vocabulary: int = 512) -> Any:
    """Megatron's GPT, to generate with."""
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        configuration(shape, kind, ranks, False),
        layer_spec(kind),
        vocab_size=vocabulary,
        max_sequence_length=4 * shape.sequence_length,
        position_embedding_type="rope",
    )
    checked(model.decoder, kind)
    return model.eval()


def checked(block: Any, kind: str) -> Any:
    names = {type(layer).__name__ for layer in block.layers}
    wanted = {"ladder": {"LadderTransformerLayer"}, "desync": {"DesyncTransformerLayer"}}
    if kind in wanted and names != wanted[kind]:
        raise RuntimeError("the plugin is off: unset MEGATRON_PLUGINS_DISABLE")
    return block
