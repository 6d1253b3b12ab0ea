"""Combinations in which ranks cannot have streams of their own."""

from __future__ import annotations

from argparse import Namespace

from megatron_plugins.refusals import Refusal, cuda_graphs, hybrid_model, on
from torch_plugins.config import W4A4, CrossLayerAttention, DenseMoE, LadderResidual

_REPLICATED = "it has weights that all ranks share, whose inputs would differ between them"
_INSIDE = "it communicates inside the linear, where there must be nothing to communicate"
_UNTESTED = "two changes of what a module reads, which were not tested together"


def _dropout_of_parts(args: Namespace) -> bool:
    return bool(args.sequence_parallel and args.hidden_dropout)


REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "biases",
        lambda args: bool(args.add_bias_linear),
        "each rank would add one to its own stream; add --disable-bias-linear",
    ),
    Refusal(
        "--hidden-dropout with --sequence-parallel",
        _dropout_of_parts,
        "ranks draw masks of their own then, and drop from one sum differently; add "
        "--hidden-dropout 0",
    ),
    Refusal("--num-experts", on("num_experts"), f"the router: {_REPLICATED}"),
    Refusal("--multi-latent-attention", on("multi_latent_attention"), _REPLICATED),
    Refusal("--experimental-attention-variant", on("experimental_attention_variant"), _REPLICATED),
    Refusal("--linear-attention-freq", on("linear_attention_freq"), _REPLICATED),
    Refusal(
        "--hybrid-layer-pattern",
        hybrid_model,
        "a hybrid stack builds its own layers, which would have one stream",
    ),
    Refusal(
        "--heterogeneous-layers-config-path",
        on("heterogeneous_layers_config_path"),
        "its layers may lack an attention or an MLP, and the pattern counts both",
    ),
    Refusal(
        "--mtp-num-layers",
        on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would have one stream",
    ),
    Refusal(
        "--enable-mhc-connections",
        on("enable_mhc_connections"),
        "hyper-connections replace the residual stream",
    ),
    Refusal(
        "--distribute-saved-activations",
        on("distribute_saved_activations"),
        "it saves a T-th of one stream on each rank, and these are T streams",
    ),
    Refusal("--tp-comm-overlap", on("tp_comm_overlap"), _INSIDE),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        _INSIDE,
    ),
    Refusal("--inference-fuse-tp-communication", on("inference_fuse_tp_communication"), _INSIDE),
    Refusal("--use-transformer-engine-op-fuser", on("use_transformer_engine_op_fuser"), _INSIDE),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        on("overlap_moe_expert_parallel_comm"),
        "it runs the layers without their forward, in which a region begins",
    ),
    Refusal("--cuda-graph-impl", cuda_graphs, "not tested"),
    Refusal("--use-megatron-fsdp", on("use_megatron_fsdp"), "not tested: it shards the norms"),
    Refusal("--use-torch-fsdp2", on("use_torch_fsdp2"), "not tested: it shards the norms"),
    Refusal(LadderResidual.flag(), on(LadderResidual.key()), _UNTESTED),
    Refusal(CrossLayerAttention.flag(), on(CrossLayerAttention.key()), _UNTESTED),
    Refusal(DenseMoE.flag(), on(DenseMoE.key()), f"the routers: {_REPLICATED}"),
    Refusal(
        W4A4.flag(),
        on(W4A4.key()),
        "clips are learned by all ranks together, of inputs that would differ between them",
    ),
)
