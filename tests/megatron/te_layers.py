"""Layers of TransformerEngine's spec that plugins have rewritten, and stock ones, by two processes:
built, and their state read. te_ladder.py runs some.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.megatron import te_compiled  # noqa: F401

# isort: split
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_plugins.hybrid_specs import local_stack_spec
from tests.megatron.hybrid_upstream import STACK, HybridModel, upstream_spec
from torch_plugins.config import W4A4, CrossLayerAttention, DenseMoE, LadderResidual, PowerMup


def build(
    ladder: bool,
    sharing: CrossLayerAttention | None = None,
    te: bool = True,
    features: dict[str, Any] | None = None,
    spec: Any = None,
    **options: Any,
) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        **options,
    )
    if features is not None:
        config.megatron_plugins = features
        config.hetereogenous_dist_checkpoint = True
    if ladder:
        config.megatron_plugins = {
            "ladder_residual": LadderResidual(),
            "power_mup": PowerMup(residual_multiplier=0.5),
        }
    if sharing is not None:
        config.megatron_plugins = {"cross_layer_attention": sharing}
        config.hetereogenous_dist_checkpoint = True
    if spec is None:
        spec = get_gpt_layer_with_transformer_engine_spec() if te else get_gpt_layer_local_spec()
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=32)


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def shared_shards(te: bool) -> dict[str, list[int]]:
    """Shapes of the shards, by the key in a checkpoint, of one layer that shares the keys and
    values of another, which have a norm of their own."""
    model = build(False, CrossLayerAttention(2, kv_norm="separate"), te)
    shards = model.sharded_state_dict().values()
    return {shard.key: list(shard.local_shape) for shard in shards if hasattr(shard, "local_shape")}


def expert_shards(te: bool) -> dict[str, list[int]]:
    """Shapes of the shards of layers with experts, norms apart from the linears behind them."""
    feature = DenseMoE(num_experts=4, attention_experts=2, router_hidden_size=8)
    options = {"num_query_groups": 2, "ffn_hidden_size": 64, "add_bias_linear": False}
    sharing = CrossLayerAttention(2, kv_norm="separate")
    features = {"dense_moe": feature, "cross_layer_attention": sharing}
    model = build(False, te=te, features=features, **options)
    state = model.sharded_state_dict()
    apply_factories(state)
    shards = [
        x for value in state.values() for x in (value if isinstance(value, list) else [value])
    ]
    return {shard.key: list(shard.local_shape) for shard in shards if hasattr(shard, "local_shape")}


def quantized() -> dict[str, Any]:
    """Layers whose linears quantize their inputs, and stock ones."""
    model, stock = build(False, features={"w4a4": W4A4(clip_init=2)}), build(False, features={})
    layer = model.decoder.layers[0]
    linears = {
        "qkv": layer.self_attention.linear_qkv,
        "proj": layer.self_attention.linear_proj,
        "fc1": layer.mlp.linear_fc1,
        "fc2": layer.mlp.linear_fc2,
    }
    clips = [p for n, p in model.named_parameters() if "clip" in n]

    def keys(model: GPTModel) -> list[str]:
        shards = model.sharded_state_dict().values()
        return sorted(shard.key for shard in shards)

    return {
        "classes": {name: type(linear).__mro__[1].__name__ for name, linear in linears.items()},
        "columns": [name for name, linear in linears.items() if linear.penalty.column],
        "projections": [len(linear.penalty.names) for linear in linears.values()],
        "reduced": [name for name, linear in linears.items() if linear.input_quantizer.reduce],
        "norms": [type(layer.input_layernorm).__name__, type(layer.pre_mlp_layernorm).__name__],
        "summed clips": [len(clips), sum(p.sequence_parallel for p in clips)],
        "keys": keys(model),
        "stock keys": keys(stock),
    }


def stock_keys() -> list[str]:
    """Of a stock MoE layer of TransformerEngine's spec, its experts one by one."""
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=False)
    options = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "add_bias_linear": False}
    model = build(False, spec=spec, **options)
    shards = model.sharded_state_dict().values()
    return sorted({shard.key for shard in shards if ".mlp." in shard.key or "pre_mlp" in shard.key})


def hybrid() -> dict[str, Any]:
    """Hybrid stacks of upstream's own spec: with a ladder, with shared keys, and stock."""

    def built(features: dict[str, Any] | None, spec: Any = upstream_spec) -> Any:
        config = TransformerConfig(
            num_layers=5,
            hidden_size=32,
            num_attention_heads=4,
            num_moe_experts=2,
            moe_ffn_hidden_size=16,
            add_bias_linear=False,
            use_cpu_initialization=True,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
        )
        if features is not None:
            config.megatron_plugins = features
        return HybridModel(
            config=config,
            vocab_size=64,
            max_sequence_length=32,
            hybrid_layer_pattern="*-*E-",
            **{STACK: spec},
        )

    ladder = built({"ladder_residual": LadderResidual("1-3")})
    stock, local = built(None), built(None, local_stack_spec)
    sharing = {"cross_layer_attention": CrossLayerAttention(2, kv_norm="separate")}
    shared, local_shared = built(sharing), built(sharing, local_stack_spec)

    def shards(model: Any) -> dict[str, list[int]]:
        """Of attention and MLP layers: experts may be grouped."""
        state = {k: v for k, v in model.sharded_state_dict().items() if "layers.3." not in k}
        return {v.key: list(v.local_shape) for v in state.values() if hasattr(v, "local_shape")}

    layers = ladder.decoder.layers
    linears = [layers[0].self_attention.linear_proj, layers[1].mlp.linear_fc2]
    linears += [layers[2].self_attention.linear_proj, layers[4].mlp.linear_fc2]
    return {
        "classes": [type(layer).__name__ for layer in layers],
        "parallel modes": [linear.parallel_mode for linear in linears],
        "same keys": list(ladder.state_dict()) == list(stock.state_dict()),
        "same shards": sorted(ladder.sharded_state_dict()) == sorted(stock.sharded_state_dict()),
        "shards": shards(stock),
        "shards, local layers": shards(local),
        "sharing": shards(shared),
        "sharing, local layers": shards(local_shared),
    }


def found() -> dict[str, Any]:
    model, stock = build(True), build(False)
    linears = [
        (layer.self_attention.linear_proj, layer.mlp.linear_fc2) for layer in model.decoder.layers
    ]
    shards, stock_shards = model.sharded_state_dict(), stock.sharded_state_dict()
    return {
        "classes": sorted({type(linear).__name__ for pair in linears for linear in pair}),
        "parallel modes": [[linear.parallel_mode for linear in pair] for pair in linears],
        "multipliers": [
            add.residual_multiplier for layer in model.decoder.layers for add in layer._add.values()
        ],
        "stock parallel mode": stock.decoder.layers[0].mlp.linear_fc2.parallel_mode,
        "same shapes": shapes(model) == shapes(stock),
        "same keys": list(model.state_dict()) == list(stock.state_dict()),
        "same shards": {k: getattr(v, "global_offset", None) for k, v in shards.items()}
        == {k: getattr(v, "global_offset", None) for k, v in stock_shards.items()},
        "sharing": shared_shards(te=True),
        "sharing, local layers": shared_shards(te=False),
        "experts": expert_shards(te=True),
        "experts, local layers": expert_shards(te=False),
        "stock experts": stock_keys(),
        "quantized": quantized(),
        "hybrid": hybrid(),
    }
