"""The configuration of a decoder -> the arguments of a Megatron run, or a refusal.

What is written is what the exporter reads: :func:`arguments` lets it make a configuration of them
again, and refuses a model whose configuration that is not.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch

from megatron_plugins.arguments import set_features
from megatron_plugins.export.arguments import decoder_config
from torch_plugins.config import ConfigError, PowerMup

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig

NAMES = {
    "hidden_act": "SwiGLU (silu) is what --swiglu computes",
    "norm_eps": "",
    "attention_bias": "Megatron has a bias in all linear layers, mlp_bias included, or in none",
    "attention_output_bias": "Megatron has a bias in all linear layers or in none",
    "mlp_bias": "Megatron has a bias in all linear layers, attention_bias included, or in none",
    "rope_parameters": "Megatron's GPT builders know no RoPE but the default one, and llama3 with "
    "factor 8, low_freq_factor 1, high_freq_factor 4 and original_max_position_embeddings 8192",
    "embedding_multiplier": "",
    "attention_multiplier": "",
    "residual_multiplier": "",
    "logits_scaling": "",
    "tie_word_embeddings": "",
    "initializer_range": "",
    "head_dim": "",
    "num_key_value_heads": "",
    "max_position_embeddings": "",
}
"""Fields that decide the function, and what is known of those that Megatron may not have."""


def arguments(config: PluginDecoderConfig, dtype: torch.dtype) -> Namespace:
    """Those of a run that trains the model, as its checkpoint would keep them.

    The size of the padded vocabulary is left out: it follows from the tokenizer and the tensor
    parallel size of the run that loads the checkpoint. Rows of padding begin at zero, and their
    logits take part in Megatron's softmax: with ``--make-vocab-size-divisible-by 1`` there are as
    few as tensor parallelism needs.

    Raises:
        ConfigError: names the fields that Megatron cannot express.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rope = config.rope_parameters
    bias = config.attention_bias and config.mlp_bias
    args = Namespace(
        num_layers=config.num_hidden_layers,
        encoder_num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups,
        kv_channels=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=_whole(rope["rope_theta"]),
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None,
        use_rope_scaling=rope.get("rope_type", "default") == "llama3",
        rope_scaling_factor=8.0,
        swiglu=True,
        squared_relu=False,
        bias_gelu_fusion=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        layernorm_zero_centered_gamma=False,
        apply_layernorm_1p=False,
        qk_layernorm=False,
        add_bias_linear=bias,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        attention_dropout=float(config.attention_dropout),
        hidden_dropout=0.0,
        init_method_std=config.initializer_range,
        vocab_size=config.vocab_size,
        padded_vocab_size=None,
        make_vocab_size_divisible_by=1,
        tokenizer_type=None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        **_without_mup(),
    )
    if not _is_neutral(config):
        _add_multipliers(args, config)
    _check(args, config, dtype)
    return args


def _whole(number: float) -> float | int:
    """``--rotary-base`` is an integer."""
    return int(number) if float(number).is_integer() else number


def _without_mup() -> dict[str, Any]:
    return {
        "use_mup": False,
        "mup_base_hidden_size": None,
        "mup_embedding_mult": 1.0,
        "mup_output_mult": 1.0,
        "mup_base_head_dim": None,
        "mup_attn_scale_power": 1.0,
    }


def _is_neutral(config: PluginDecoderConfig) -> bool:
    """Whether no multiplier differs from those of Llama."""
    ones = config.embedding_multiplier, config.residual_multiplier, config.logits_scaling
    return ones == (1, 1, 1) and config.attention_multiplier == config.head_dim**-0.5


def _add_multipliers(args: Namespace, config: PluginDecoderConfig) -> None:
    """Granite's multipliers as the muP recipe; ``power_mup.multipliers`` is the way back.

    With ``m = logits_scaling`` the base width is ``D / m`` where that is a whole number: Granite
    was trained so, and hidden matrices learn at ``lr / m`` again. Else the logits alone are scaled.
    """
    set_features(
        args, {PowerMup.key(): PowerMup(residual_multiplier=float(config.residual_multiplier))}
    )
    args.use_mup = True
    args.mup_embedding_mult = float(config.embedding_multiplier)
    width = config.hidden_size / config.logits_scaling
    if width.is_integer() and config.hidden_size / width == config.logits_scaling:
        args.mup_base_hidden_size = int(width)
    else:
        args.mup_output_mult = 1.0 / config.logits_scaling
    size, scale = config.head_dim, config.attention_multiplier
    if scale == size**-0.5:
        args.mup_attn_scale_power = 0.5
    elif scale != 1 / size:
        args.mup_base_head_dim = float((scale * size) ** 2)


def _check(args: Namespace, config: PluginDecoderConfig, dtype: torch.dtype) -> None:
    found = decoder_config(args, config.vocab_size, str(dtype).removeprefix("torch."))
    wrong = [name for name in NAMES if not _same(getattr(config, name), getattr(found, name))]
    if wrong:
        lines = [
            f"{'rms_norm_eps' if name == 'norm_eps' else name} {getattr(config, name)!r}: "
            f"{NAMES[name] or f'Megatron would compute {getattr(found, name)!r}'}"
            for name in wrong
        ]
        raise ConfigError("Megatron cannot express\n  " + "\n  ".join(lines))


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, dict):
        kept = {k: v for k, v in wanted.items() if (k, v) != ("partial_rotary_factor", 1.0)}
        return bool(kept == found)
    if isinstance(wanted, int | float):  # of which Granite's folders have both
        return math.isclose(wanted, found, rel_tol=1e-15)
    return bool(wanted == found)
