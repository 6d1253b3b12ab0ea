"""Combinations in which a ladder cannot work."""

from __future__ import annotations

from megatron_plugins.refusals import Refusal, cuda_graphs, on

_BYPASS = "it runs the layers without their forward, so the residual would be the standard one"
_UNREAD = "it computes the reduction inside the linear, where the ladder must not have one"

REFUSED: tuple[Refusal, ...] = (
    Refusal("--cuda-graph-impl", cuda_graphs, f"a captured layer is replayed alone: {_BYPASS}"),
    Refusal("--tp-comm-overlap", on("tp_comm_overlap"), f"userbuffers: {_UNREAD}"),
    Refusal("--overlap-moe-expert-parallel-comm", on("overlap_moe_expert_parallel_comm"), _BYPASS),
    Refusal(
        "--mtp-num-layers",
        on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would not be ladders",
    ),
    Refusal(
        "--enable-mhc-connections",
        on("enable_mhc_connections"),
        "hyper-connections replace the residual stream that the ladder reads",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        _UNREAD,
    ),
    Refusal("--inference-fuse-tp-communication", on("inference_fuse_tp_communication"), _UNREAD),
    Refusal("--use-transformer-engine-op-fuser", on("use_transformer_engine_op_fuser"), _UNREAD),
    Refusal("--symmetric-ar-type", on("symmetric_ar_type"), _UNREAD),
    Refusal(
        "--heterogeneous-layers-config-path",
        on("heterogeneous_layers_config_path"),
        "its layers may lack an attention or an MLP, and the recurrence needs both",
    ),
    Refusal(
        "--use-megatron-fsdp",
        on("use_megatron_fsdp"),
        "it frees a layer's bias before the ladder adds it",
    ),
    Refusal(
        "--use-torch-fsdp2",
        on("use_torch_fsdp2"),
        "it frees a layer's bias before the ladder adds it",
    ),
    Refusal(
        "--cpu-offloading-num-layers",
        on("cpu_offloading_num_layers"),
        "it may copy an output to the host while its reduction still runs",
    ),
    Refusal(
        "--fine-grained-activation-offloading",
        on("fine_grained_activation_offloading"),
        "it frees the residual after the attention, and the ladder still reads it",
    ),
)
