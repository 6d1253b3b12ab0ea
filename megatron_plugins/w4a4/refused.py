"""What W4A4 cannot be combined with, and why."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from megatron_plugins.refusals import Refusal, cuda_graphs, on


def _kurtosis(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: args.w4a4_kurtosis_weight != 0 and when(args)


def _weights(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: bool(args.w4a4_weight_bits) and when(args)


def _percentile(when: Callable[[Namespace], bool]) -> Callable[[Namespace], bool]:
    return lambda args: str(args.w4a4_clip_init).startswith("percentile") and when(args)


def _transformer_engine(args: Namespace) -> bool:
    return getattr(args, "transformer_impl", None) == "transformer_engine"


def _parallel(args: Namespace) -> bool:
    return bool(args.tensor_model_parallel_size > 1)


_FUSED = "it computes linears in operators of its own, whose inputs cannot be quantized"
_PRECISION = "it quantizes the same linears in its own way; W4A4 trains in bf16 or fp32"
_MAIN = (
    "its copies of the clips cannot be set after the first iteration; give "
    "--w4a4-clip-init a value, such as 4"
)
_WHOLE = "the kurtosis of queries, keys and values apart needs them as they are; "
_OFF = "use --w4a4-kurtosis-weight 0"

REFUSED: tuple[Refusal, ...] = (
    Refusal("--fp8-format", on("fp8"), _PRECISION),
    Refusal("--fp4-format", on("fp4"), _PRECISION),
    Refusal(
        "--kitchen-config-file",
        lambda args: any(
            on(name)(args)
            for name in ("use_kitchen", "kitchen_config_file", "kitchen_recipe_number")
        ),
        _PRECISION,
    ),
    Refusal("--modelopt-enabled", on("modelopt_enabled"), _PRECISION),
    Refusal(
        "gradient accumulation fusion",
        _weights(on("gradient_accumulation_fusion")),
        "it writes gradients past the quantization of the weights (--w4a4-weight-bits); add "
        "--no-gradient-accumulation-fusion",
    ),
    Refusal(
        "--transformer-impl transformer_engine",
        _weights(_transformer_engine),
        "TransformerEngine's linears take no other weight than their own: --w4a4-weight-bits works "
        "with --transformer-impl local",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda args: getattr(args, "transformer_impl", None) == "inference_optimized",
        _FUSED,
    ),
    Refusal("--use-transformer-engine-op-fuser", on("use_transformer_engine_op_fuser"), _FUSED),
    Refusal("--inference-fuse-tp-communication", on("inference_fuse_tp_communication"), _FUSED),
    Refusal("--tp-comm-overlap", on("tp_comm_overlap"), _FUSED),
    Refusal("--mlp-chunks-for-prefill", on("mlp_chunks_for_prefill", 1), _FUSED),
    Refusal(
        "--moe-grouped-gemm",
        on("moe_grouped_gemm"),
        "its experts are one operator; leave it out, and each expert is an MLP of its own",
    ),
    Refusal(
        "--moe-shared-expert-overlap",
        on("moe_shared_expert_overlap"),
        "shared experts call their collectives apart from their linears then",
    ),
    Refusal(
        "--expert-tensor-parallel-size",
        lambda args: bool(args.num_experts) and (args.expert_tensor_parallel_size or 1) > 1,
        "an expert's clips would be learned from parts of its features; use 1, the processes then "
        "hold whole experts",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        on("overlap_moe_expert_parallel_comm"),
        "it runs the parts of a layer apart",
    ),
    Refusal(
        "--multi-latent-attention", on("multi_latent_attention"), "not tested: it has other linears"
    ),
    Refusal(
        "--experimental-attention-variant",
        on("experimental_attention_variant"),
        "not tested: it has other linears",
    ),
    Refusal(
        "--hybrid-layer-pattern",
        lambda args: any(
            on(name)(args)
            for name in ("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model")
        ),
        "a hybrid stack builds its own layers, which would not be quantized",
    ),
    Refusal(
        "--mtp-num-layers",
        on("mtp_num_layers"),
        "prediction layers are built outside the transformer block and would not be quantized",
    ),
    Refusal(
        "--num-query-groups",
        _kurtosis(
            lambda args: (
                bool(args.group_query_attention)
                and (args.num_query_groups or 1) < args.tensor_model_parallel_size
            )
        ),
        _WHOLE + "with fewer groups than tensor-parallel processes none has them. Use more groups, "
        "or --w4a4-kurtosis-weight 0",
    ),
    Refusal("--attention-output-gate", _kurtosis(on("attention_output_gate")), _WHOLE + _OFF),
    Refusal(
        "--moe-mlp-glu-interleave-size",
        _kurtosis(on("moe_mlp_glu_interleave_size")),
        f"the kurtosis of gate and up apart needs them whole; {_OFF}",
    ),
    Refusal(
        "--ladder-residual",
        lambda args: _kurtosis(on("ladder_residual"))(args) and _parallel(args),
        "its row-parallel linears put out partial sums, whose kurtosis is another, and to wait for "
        f"the whole would undo the overlap; {_OFF}",
    ),
    Refusal(
        "--dense-moe",
        on("dense_moe"),
        "sparse inference reads the experts' weights without calling their linears",
    ),
    Refusal(
        "--cross-layer-attention",
        lambda args: on("cross_layer_attention")(args) and _transformer_engine(args),
        "not tested with TransformerEngine's linears, which contain the norms; use "
        "--transformer-impl local",
    ),
    Refusal("--cuda-graph-impl", cuda_graphs, "quantizers change with the iteration"),
    Refusal("--use-megatron-fsdp", on("use_megatron_fsdp"), "not tested: it shards the clips"),
    Refusal("--use-torch-fsdp2", on("use_torch_fsdp2"), "not tested: it shards the clips"),
    Refusal(
        "--use-precision-aware-optimizer", _percentile(on("use_precision_aware_optimizer")), _MAIN
    ),
    Refusal("--optimizer-cpu-offload", _percentile(on("optimizer_cpu_offload")), _MAIN),
)
