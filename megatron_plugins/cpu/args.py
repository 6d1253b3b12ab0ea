"""Megatron's options on the CPU backend: what is switched off, and what is refused."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_plugins.cpu import FLAG
from megatron_plugins.refusals import Refusal, refuse

SETTINGS: dict[str, tuple[Any, str]] = {
    "transformer_impl": ("local", "--transformer-impl local"),
    "distributed_backend": ("gloo", "--distributed-backend gloo"),
    "no_persist_layer_norm": (True, "--no-persist-layer-norm"),
    "gradient_accumulation_fusion": (False, "--no-gradient-accumulation-fusion"),
    "masked_softmax_fusion": (False, "--no-masked-softmax-fusion"),
    "apply_rope_fusion": (False, "--no-rope-fusion"),
    "moe_permute_fusion": (False, "no --moe-permute-fusion"),
    "moe_router_fusion": (False, "no --moe-router-fusion"),
    "moe_grouped_gemm": (False, "no --moe-grouped-gemm"),
    "ddp_average_in_collective": (False, "no --ddp-average-in-collective"),
}
"""argparse destination -> the value that runs on a CPU, and how a user would write it.

All compute the same function as what they replace. The bias, activation and dropout fusions stay:
upstream writes them in torch, for a compiler that is off here.
"""

# Upstream's batched exchange pairs two sends and two receives between the same two ranks by order.
INTERLEAVED = ("overlap_p2p_comm", True, "no --no-overlap-p2p-communication")
# Experts run one by one here, and upstream fuses only SwiGLU into those.
SEQUENTIAL_EXPERTS = ("bias_gelu_fusion", False, "--no-bias-gelu-fusion")


def _is(dest: str, *values: Any) -> Callable[[Namespace], bool]:
    return lambda args: getattr(args, dest, None) in values


def _on(dest: str) -> Callable[[Namespace], bool]:
    return lambda args: bool(getattr(args, dest, None))


def _tensor_parallel(args: Namespace) -> int:
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


_NO_TE = "needs TransformerEngine's CUDA kernels"
_NO_GRAPH = "there is no CUDA graph on a CPU"

REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "--context-parallel-size",
        lambda args: args.context_parallel_size > 1,
        "the local attention knows no context parallelism",
    ),
    Refusal(
        "--multi-latent-attention",
        _on("multi_latent_attention"),
        "the local attention has one size for keys and values",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        _is("transformer_impl", "inference_optimized"),
        _NO_TE,
    ),
    Refusal("--fp8-format", _on("fp8"), _NO_TE),
    Refusal("--fp4-format", _on("fp4"), _NO_TE),
    Refusal("--tp-comm-overlap", _on("tp_comm_overlap"), _NO_TE),
    Refusal("--use-precision-aware-optimizer", _on("use_precision_aware_optimizer"), _NO_TE),
    Refusal("--te-rng-tracker", _on("te_rng_tracker"), _NO_TE),
    Refusal("--enable-cuda-graph", _on("enable_cuda_graph"), _NO_GRAPH),
    Refusal("--external-cuda-graph", _on("external_cuda_graph"), _NO_GRAPH),
    Refusal(
        "--cuda-graph-impl",
        lambda args: getattr(args, "cuda_graph_impl", None) not in (None, "none"),
        _NO_GRAPH,
    ),
    Refusal("--use-megatron-fsdp", _on("use_megatron_fsdp"), "it manages CUDA memory and streams"),
    Refusal("--use-torch-fsdp2", _on("use_torch_fsdp2"), "it builds a mesh of CUDA devices"),
    Refusal("--use-nccl-ub", _on("nccl_ub"), "there is no NCCL"),
    Refusal(
        "--moe-token-dispatcher-type flex",
        _is("moe_token_dispatcher_type", "flex"),
        "it needs CUDA kernels; use alltoall or allgather",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        _on("overlap_moe_expert_parallel_comm"),
        "there are no streams to overlap on",
    ),
    Refusal(
        "--num-experts",
        lambda args: (
            bool(args.num_experts)
            and args.add_bias_linear
            and args.expert_model_parallel_size * _tensor_parallel(args) == 1
        ),
        "upstream's sequential experts add their bias in place where autograd forbids it; give "
        "--disable-bias-linear",
    ),
    Refusal(
        "--optimizer-cpu-offload",
        _on("optimizer_cpu_offload"),
        "there is no device to offload from",
    ),
    Refusal(
        "--cpu-offloading-num-layers",
        _on("cpu_offloading_num_layers"),
        "there is no device to offload from",
    ),
)


def adjust_args(args: Namespace) -> None:
    """Set ``args``, parsed but not yet validated, to what runs on a CPU; rank 0 prints one line.

    Raises:
        ConfigError: an option that no change of implementation can satisfy.
    """
    refuse(args, FLAG, REFUSED)
    settings = [(dest, value, text) for dest, (value, text) in SETTINGS.items()]
    if _interleaved(args):
        settings.append(INTERLEAVED)
    if args.num_experts:
        settings.append(SEQUENTIAL_EXPERTS)
    changed = []
    for dest, value, text in settings:
        if hasattr(args, dest) and getattr(args, dest) != value:
            setattr(args, dest, value)
            changed.append(text)
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"{FLAG}: as if given {', '.join(changed)}", flush=True)


def _interleaved(args: Namespace) -> bool:
    """Whether virtual pipeline stages are asked for, in any of the ways to say it."""
    return any(
        getattr(args, dest, None)
        for dest in (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "virtual_pipeline_model_parallel_size",
            "pipeline_model_parallel_layout",
        )
    )
