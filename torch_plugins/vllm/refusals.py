"""What the decoder can say and vLLM's layers cannot do, refused before a weight is built.

Standard library only: the rules are tested where vLLM is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import FEATURES, ConfigError, CrossLayerAttention, LadderResidual

SERVED = (LadderResidual, CrossLayerAttention)
"""Features that the model has; another one in a configuration is another function."""

REMEDIES = {
    "dense_moe": "; vLLM serves what the exporters write as qwen2_moe or qwen3_moe: SwiGLU experts "
    'with router "linear" and inference "dense" or "top-k", without attention experts'
}
"""By key of a feature that is not served."""

ACTIVATIONS = (
    *("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"),
    *("quick_gelu", "relu", "relu2", "sigmoid", "silu", "swish", "tanh"),
)
"""``hidden_act`` of an ungated MLP: one name and one formula in transformers and vLLM."""

GATED_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "silu", "swish")

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""The others differ: vLLM fixes the frequencies of ``dynamic`` and ``longrope`` at start, where
transformers follows the length of the sequence."""


def check(
    config: Any,
    *,
    tensor_parallel: int = 1,
    stage_starts: Sequence[int] = (0,),
    quantization: str | None = None,
    fast_prefill: bool = False,
) -> None:
    """Refuse what would fail obscurely, or compute another function.

    Args:
        config: a ``PluginDecoderConfig``.
        stage_starts: first layer of every pipeline stage.
        quantization: name of vLLM's method.
        fast_prefill: vLLM's ``--kv-sharing-fast-prefill``.

    Raises:
        ConfigError: names the field or option, its value and the remedy.
    """
    for feature in FEATURES:
        if feature.has_section and feature not in SERVED and getattr(config, feature.key(), None):
            remedy = REMEDIES.get(feature.key(), "")
            raise ConfigError(
                f"{feature.key()}: {feature.title} is not served by the vLLM model{remedy}"
            )
    known = GATED_ACTIVATIONS if config.mlp_gated else ACTIVATIONS
    if config.hidden_act not in known:
        kind = "a gated" if config.mlp_gated else "an ungated"
        raise ConfigError(
            f"hidden_act {config.hidden_act!r} of {kind} MLP: vLLM has {', '.join(known)}"
        )
    if config.position_embedding_type == "rope":
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_parameters.rope_type {rope_type!r}: served are {', '.join(ROPE_TYPES)}"
            )
    heads = config.num_key_value_heads
    if heads % tensor_parallel and tensor_parallel % heads:
        raise ConfigError(
            f"num_key_value_heads {heads} with --tensor-parallel-size {tensor_parallel}: "
            "one must divide the other"
        )
    if quantization is not None:
        raise ConfigError(f"--quantization {quantization}: serve this model unquantized")
    if fast_prefill:
        raise ConfigError("--kv-sharing-fast-prefill: this model computes every prompt token")
    _check_stages(config.kv_producers, stage_starts)


def _check_stages(producers: Sequence[int], starts: Sequence[int]) -> None:
    """A consumer reads the cache of its producer, which only its own pipeline stage has."""
    for start in starts:
        if producers[start] != start:
            raise ConfigError(
                f"--pipeline-parallel-size {len(starts)}: a stage starts at layer {start}, which "
                f"shares the keys and values of layer {producers[start]}; "
                f"{_remedy(producers, len(starts))}"
            )


def _remedy(producers: Sequence[int], stages: int) -> str:
    """A partition at the producers nearest to even stages."""
    layers, own = len(producers), sorted(set(producers))
    if len(own) < stages:
        return f"at most {len(own)} stages fit"
    bounds = [0]
    for stage in range(1, stages):
        allowed = own[own.index(bounds[-1]) + 1 : len(own) - (stages - 1 - stage)]
        bounds.append(min(allowed, key=lambda start: abs(start - stage * layers / stages)))
    sizes = [end - start for start, end in zip(bounds, [*bounds[1:], layers], strict=True)]
    return f"set VLLM_PP_LAYER_PARTITION={','.join(map(str, sizes))}"
