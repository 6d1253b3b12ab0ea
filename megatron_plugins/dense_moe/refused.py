"""What DS-MoE cannot be combined with, and why."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from megatron_plugins.refusals import Refusal


def _on(name: str, *off: object) -> Callable[[Namespace], bool]:
    """Whether an argument is present and set to something other than its ``off`` values."""
    return lambda args: getattr(args, name, None) not in (None, False, 0, *off)


def _mlp(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: bool(args.dsmoe_num_experts) and when(args)


def _heads(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: bool(args.dsmoe_attention_experts) and when(args)


def _cuda_graphs(args: Namespace) -> bool:
    return any(
        _on(name, "none")(args)
        for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
    )


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
        _mlp(_on("num_experts")),
        "the MLP is a stock mixture of experts already, with a dispatcher",
    ),
    Refusal("--multi-latent-attention", _heads(_on("multi_latent_attention")), _OTHER),
    Refusal(
        "--experimental-attention-variant", _heads(_on("experimental_attention_variant")), _OTHER
    ),
    Refusal("--heterogeneous-layers-config-path", _on("heterogeneous_layers_config_path"), _WIDTH),
    Refusal(
        "--use-transformer-engine-op-fuser", _mlp(_on("use_transformer_engine_op_fuser")), _FUSED
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        _FUSED,
    ),
    Refusal("--inference-fuse-tp-communication", _on("inference_fuse_tp_communication"), _FUSED),
    Refusal(
        "--squared-relu",
        _mlp(_on("squared_relu")),
        "experts are GELU, or SwiGLU with --dsmoe-gated",
    ),
    Refusal(
        "--quick-geglu", _mlp(_on("quick_geglu")), "experts are GELU, or SwiGLU with --dsmoe-gated"
    ),
    Refusal(
        "--context-parallel-size",
        lambda args: args.context_parallel_size > 1,
        "the loss of the routers was not tested over parts of a sequence",
    ),
    Refusal(
        "--mtp-num-layers",
        _on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would have no experts",
    ),
    Refusal(
        "--cuda-graph-impl",
        _cuda_graphs,
        "the loss of the routers and their statistics are counted outside the graph",
    ),
    Refusal("--overlap-moe-expert-parallel-comm", _on("overlap_moe_expert_parallel_comm"), _FUSED),
    Refusal("--use-megatron-fsdp", _on("use_megatron_fsdp"), "not tested: it shards the routers"),
    Refusal("--use-torch-fsdp2", _on("use_torch_fsdp2"), "not tested: it shards the routers"),
    Refusal(
        "--fp8-format",
        lambda args: _mlp(_on("fp8"))(args) and args.dsmoe_inference != "dense",
        "sparse inference reads the weights as they are; use --dsmoe-inference dense",
    ),
)
