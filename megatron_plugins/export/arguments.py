"""The arguments of a Megatron run -> the configuration of the exported decoder, or a refusal."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_plugins import power_mup
from megatron_plugins.arguments import features_of
from megatron_plugins.refusals import Refusal
from torch_plugins.config import W4A4, ConfigError
from torch_plugins.w4a4.marker import SECTION, marker

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig

OWN_SPECS = "megatron_plugins.specs"


def _set(name: str) -> Callable[[Namespace], bool]:
    return lambda args: bool(getattr(args, name, None))


def _other(name: str, *allowed: Any) -> Callable[[Namespace], bool]:
    return lambda args: getattr(args, name, allowed[0]) not in allowed


def _foreign_spec(args: Namespace) -> bool:
    spec: list[str] = getattr(args, "spec", None) or ["local"]
    return spec[0] not in (OWN_SPECS, "local")


REFUSED: tuple[Refusal, ...] = (
    Refusal("--num-experts", _set("num_experts"), "the decoder has no MoE layers"),
    Refusal("--multi-latent-attention", _set("multi_latent_attention"), "no latent attention"),
    Refusal("--mtp-num-layers", _set("mtp_num_layers"), "no multi-token prediction layers"),
    Refusal("--hybrid-layer-pattern", _set("hybrid_layer_pattern"), "only GPT models"),
    Refusal("--hybrid-override-pattern", _set("hybrid_override_pattern"), "only GPT models"),
    Refusal(
        "--heterogeneous-layers-config-path",
        _set("heterogeneous_layers_config_encoded_json"),
        "all layers must be of one kind",
    ),
    Refusal(
        "--experimental-attention-variant",
        _set("experimental_attention_variant"),
        "softmax attention only",
    ),
    Refusal("--linear-attention-freq", _set("linear_attention_freq"), "softmax attention only"),
    Refusal("--softmax-type", _other("softmax_type", "vanilla", None), "no attention sinks"),
    Refusal("--attention-output-gate", _set("attention_output_gate"), "no output gate"),
    Refusal("--qk-l2-norm", _set("qk_l2_norm"), "norms of queries and keys have weights"),
    Refusal("--window-size", _set("window_size"), "no sliding window"),
    Refusal("--no-rope-freq", _set("no_rope_freq"), "RoPE in all layers or in none"),
    Refusal(
        "--position-embedding-type",
        _other("position_embedding_type", "rope", "learned_absolute", "none"),
        "rope, learned_absolute or none",
    ),
    Refusal(
        "--rotary-seq-len-interpolation-factor",
        _set("rotary_seq_len_interpolation_factor"),
        "Megatron 0.18 and older read and ignore it, newer ones use it: the checkpoint does not "
        "tell which",
    ),
    Refusal(
        "--rope-scaling-factor",
        lambda args: (
            _set("use_rope_scaling")(args) and _other("rope_scaling_factor", 8.0, None)(args)
        ),
        "Megatron's GPT builders ignore it and scale by 8",
    ),
    Refusal("--quick-geglu", _set("quick_geglu"), "SwiGLU, GELU or squared ReLU"),
    Refusal(
        "--use-te-activation-func",
        lambda args: _set("use_te_activation_func")(args) and not args.swiglu,
        "its GELU is not Megatron's",
    ),
    Refusal("--glu-linear-offset", _set("glu_linear_offset"), "plain SwiGLU only"),
    Refusal("--activation-func-clamp-value", _set("activation_func_clamp_value"), "no clamping"),
    Refusal(
        "--apply-residual-connection-post-layernorm",
        _set("apply_residual_connection_post_layernorm"),
        "pre-norm residuals only",
    ),
    Refusal("--enable-mhc-connections", _set("enable_mhc_connections"), "one residual stream"),
    Refusal("--spec", _foreign_spec, "a custom layer spec can compute anything"),
    Refusal("--yaml-cfg", _set("yaml_cfg"), "the saved arguments are not what the model used"),
)
"""What the exported decoder cannot express, and why."""


def refuse_inexpressible(args: Namespace) -> None:
    """Raise one :class:`ConfigError` naming every argument that cannot be exported."""
    rows = [row for row in REFUSED if row.when(args)]
    if rows:
        lines = "\n".join(f"  {row.flag}: {row.reason}" for row in rows)
        raise ConfigError(f"this checkpoint cannot be exported; its run was started with\n{lines}")


def decoder_config(args: Namespace, vocab_size: int, dtype: str) -> PluginDecoderConfig:
    """The decoder with the function of the checkpoint's model.

    Args:
        args: as saved in the checkpoint.
        vocab_size: without padding.
        dtype: of the exported weights, as ``config.json`` names it.

    Raises:
        ConfigError: the model cannot be expressed, or an argument is missing.
    """
    from torch_plugins.hf import PluginDecoderConfig

    refuse_inexpressible(args)
    try:
        heads = args.num_attention_heads
        fields: dict[str, Any] = power_mup.multipliers(args)
        features = features_of(args).items()
        fields |= {key: feature.to_dict() for key, feature in features if feature.has_section}
        config = PluginDecoderConfig(
            vocab_size=vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.ffn_hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=args.num_query_groups if args.group_query_attention else heads,
            head_dim=args.kv_channels,
            hidden_act=_activation(args),
            mlp_gated=args.swiglu,
            normalization=args.normalization.lower(),
            norm_eps=args.layernorm_epsilon,
            attention_bias=args.add_bias_linear or args.add_qkv_bias,
            attention_output_bias=args.add_bias_linear,
            qk_norm=args.qk_layernorm,
            mlp_bias=args.add_bias_linear,
            position_embedding_type=args.position_embedding_type,
            max_position_embeddings=args.max_position_embeddings,
            rope_parameters=_rope(args),
            initializer_range=args.init_method_std,
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            dtype=dtype,
            **fields,
        )
        return mark(config, args)
    except AttributeError as error:
        raise ConfigError(
            f"the checkpoint's arguments have no {error.name!r}; it was saved by a Megatron "
            "outside of 0.17 to 0.20"
        ) from error


def mark(config: PluginDecoderConfig, args: Namespace) -> PluginDecoderConfig:
    """The configuration, which says what of the model's linear layers W4A4 quantizes."""
    from .mapping import quantized_linears

    feature = features_of(args).get(W4A4.key())
    if feature is not None and (feature.activation_bits or feature.weight_bits):
        setattr(config, SECTION, marker(feature, quantized_linears(config, args)))
    return config


def _activation(args: Namespace) -> str:
    """Megatron's fused bias-GELU is the tanh approximation, its unfused GELU is exact."""
    if args.swiglu:
        return "silu"
    if args.squared_relu:
        return "relu2"
    return "gelu_pytorch_tanh" if args.bias_gelu_fusion else "gelu"


def _rope(args: Namespace) -> dict[str, Any] | None:
    if args.position_embedding_type != "rope":
        return None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.rotary_percent < 1.0:
        rope["partial_rotary_factor"] = args.rotary_percent
    if args.use_rope_scaling:  # with the constants that RotaryEmbedding defaults to
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return rope
