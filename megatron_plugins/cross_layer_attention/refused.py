"""What Cross-Layer Attention cannot be combined with, and why."""

from __future__ import annotations

from argparse import Namespace

from megatron_plugins.refusals import Refusal, cuda_graphs, on


def _muon(args: Namespace) -> bool:
    return "muon" in str(getattr(args, "optimizer", "")) and args.muon_split_qkv


def _userbuffers(args: Namespace) -> bool:
    return bool(args.tp_comm_overlap) and args.cla_kv_norm == "separate"


_WIDTH = "it takes every linear_qkv for queries, keys and values, and a consumer's is queries only"
_OTHER = "its layers do not attend with a SelfAttention, whose keys and values are shared"
_BYPASS = "it runs the layers without their forward, which hands the keys and values on"
_FREED = "it may free a producer's keys and values while a consumer still reads them"
_GATHER = "it gathers a layer's weights by the gradient of its hidden states, not of its keys"

REFUSED: tuple[Refusal, ...] = (
    Refusal("--multi-latent-attention", on("multi_latent_attention"), _OTHER),
    Refusal("--experimental-attention-variant", on("experimental_attention_variant"), _OTHER),
    Refusal("--heterogeneous-layers-config-path", on("heterogeneous_layers_config_path"), _OTHER),
    Refusal("--attention-output-gate", on("attention_output_gate"), _WIDTH),
    Refusal("--qk-clip", on("qk_clip"), _WIDTH),
    Refusal("--optimizer muon", _muon, f"{_WIDTH}; --muon-no-split-qkv takes each for one matrix"),
    Refusal(
        "--test-mode",
        lambda args: on("test_mode")(args) and on("qk_layernorm")(args),
        "it compares norms of keys, and a consumer has none",
    ),
    Refusal(
        "--mtp-num-layers",
        on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would not share",
    ),
    Refusal("--cuda-graph-impl", cuda_graphs, f"a captured layer is replayed alone: {_BYPASS}"),
    Refusal("--overlap-moe-expert-parallel-comm", on("overlap_moe_expert_parallel_comm"), _BYPASS),
    Refusal("--cpu-offloading-num-layers", on("cpu_offloading_num_layers"), _FREED),
    Refusal(
        "--fine-grained-activation-offloading", on("fine_grained_activation_offloading"), _FREED
    ),
    Refusal("--use-megatron-fsdp", on("use_megatron_fsdp"), _GATHER),
    Refusal("--use-torch-fsdp2", on("use_torch_fsdp2"), _GATHER),
    Refusal(
        "--tp-comm-overlap",
        _userbuffers,
        "queries and keys would take turns on one userbuffer; --cla-kv-norm shared has one linear",
    ),
    Refusal(
        "--flash-decode",
        on("flash_decode"),
        "its kernel rotates and writes keys in every layer; the other engines share the cache",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        "its layers fuse the norm of the next linear_qkv, which a consumer builds in its own way",
    ),
)
