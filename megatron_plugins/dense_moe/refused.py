"""What DS-MoE cannot be combined with, and why."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from megatron_plugins.refusals import Refusal, cuda_graphs, hybrid_model, on


def _mlp(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: bool(args.dsmoe_num_experts) and when(args)


def _heads(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: bool(args.dsmoe_attention_experts) and when(args)


_OTHER = "its layers do not attend with a SelfAttention, whose heads can be experts"
_FUSED = "it computes the MLP in one operator, where the scores must go in between"
_WIDTH = "it gives a layer a width of its own, which its experts would share differently"

REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "biases",
        lambda args: bool(args.add_bias_linear),
        "experts have none; add --disable-bias-linear",
    ),
    Refusal(
        "--num-experts",
        _mlp(on("num_experts")),
        "the MLP is a stock mixture of experts already, with a dispatcher",
    ),
    Refusal("--multi-latent-attention", _heads(on("multi_latent_attention")), _OTHER),
    Refusal(
        "--experimental-attention-variant", _heads(on("experimental_attention_variant")), _OTHER
    ),
    Refusal("--heterogeneous-layers-config-path", on("heterogeneous_layers_config_path"), _WIDTH),
    Refusal(
        "--hybrid-layer-pattern",
        hybrid_model,
        "a hybrid stack builds its own layers, which would have no experts",
    ),
    Refusal(
        "--use-transformer-engine-op-fuser", _mlp(on("use_transformer_engine_op_fuser")), _FUSED
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        _FUSED,
    ),
    Refusal("--inference-fuse-tp-communication", on("inference_fuse_tp_communication"), _FUSED),
    Refusal(
        "--squared-relu",
        _mlp(on("squared_relu")),
        "experts are GELU, or SwiGLU with --dsmoe-gated",
    ),
    Refusal(
        "--quick-geglu", _mlp(on("quick_geglu")), "experts are GELU, or SwiGLU with --dsmoe-gated"
    ),
    Refusal(
        "--context-parallel-size",
        lambda args: args.context_parallel_size > 1,
        "the loss of the routers was not tested over parts of a sequence",
    ),
    Refusal(
        "--mtp-num-layers",
        on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would have no experts",
    ),
    Refusal(
        "--cuda-graph-impl",
        cuda_graphs,
        "the loss of the routers and their statistics are counted outside the graph",
    ),
    Refusal("--overlap-moe-expert-parallel-comm", on("overlap_moe_expert_parallel_comm"), _FUSED),
    Refusal("--use-megatron-fsdp", on("use_megatron_fsdp"), "not tested: it shards the routers"),
    Refusal("--use-torch-fsdp2", on("use_torch_fsdp2"), "not tested: it shards the routers"),
    Refusal(
        "--fp8-format",
        lambda args: _mlp(on("fp8"))(args) and args.dsmoe_inference != "dense",
        "sparse inference reads the weights as they are; use --dsmoe-inference dense",
    ),
)
