"""Stock models of transformers that the decoder expresses, and their configurations as its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..config import FEATURES, ConfigError
from .configuration_plugin_decoder import PluginDecoderConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite")

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "max_position_embeddings",
    "rope_parameters",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
"""Fields with one name and one meaning here and there; a family has those that it declares."""

RENAMED = ("rms_norm_eps", "head_dim")
NEUTRAL = ("pretraining_tp", "use_sliding_window", "max_window_layers")
"""Declared by a family, and without influence on a model that has no sliding window."""

OF_THE_FAMILY = ("architectures", "auto_map", "model_type", "transformers_version")
"""Attributes of a loaded configuration that say what it is one of."""

FIXED: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True},
}
"""What a family's code does without a field for it."""

ROPE_TYPES = ("default", "linear", "llama3")
"""Those that ``torch_plugins/reference.py`` can verify."""

PLAIN_MODULES = ("torch.nn.modules.", "transformers.activations")


def decoder_config(model: Any) -> PluginDecoderConfig:
    """The decoder's configuration with the function of a stock model, or a copy of its own.

    Fields that no family declares, such as notes of the user, are carried over.

    Raises:
        ConfigError: names the class of the model, or the field or module that cannot be expressed.
    """
    family = family_of(model)
    _check_modules(model, family)
    config = model.config
    if family == PluginDecoderConfig.model_type:
        return PluginDecoderConfig.from_dict(config.to_dict() | {"dtype": config.dtype})
    _check_config(config, family)
    fields = {name: getattr(config, name) for name in SAME if hasattr(config, name)}
    fields["norm_eps"] = config.rms_norm_eps
    fields["head_dim"] = getattr(config, "head_dim", None)
    fields["rope_parameters"] = dict(fields["rope_parameters"])
    result = PluginDecoderConfig(**fields | FIXED.get(family, {}))
    declared = _declared(config)
    for name, value in vars(config).items():
        if name not in declared and name not in OF_THE_FAMILY:
            setattr(result, name, value)
    return result


def family_of(model: Any) -> str:
    """``model_type`` of a causal language model that is transformers' own class of a family, or the
    decoder, be it of this package or of a folder's remote code.

    Raises:
        ConfigError: it is another class.
    """
    kind = type(model)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in FAMILIES:
        own = (_module(family), f"{family}forcausallm")
        if (kind.__module__, kind.__name__.lower()) == own:
            return family
    if family == PluginDecoderConfig.model_type and kind.__name__ == "PluginDecoderForCausalLM":
        return family
    hint = ""
    if kind.__module__.startswith("peft.") or hasattr(model, "peft_config"):
        hint = (
            "; PEFT's adapters are added to a model that has the features already, as a run "
            "without adapters saves it or torch_plugins.hf.convert.convert makes it"
        )
    raise ConfigError(
        f"{kind.__module__}.{kind.__qualname__} cannot be converted; known are the ForCausalLM "
        f"classes of transformers for {', '.join(FAMILIES)}, and {PluginDecoderConfig.model_type}"
        f"{hint}"
    )


def is_adapted(model: Any) -> bool:
    """Whether PEFT wraps the model, with adapters in its modules."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _module(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _declared(config: PretrainedConfig) -> set[str]:
    """Fields of the family's configuration class, without those that every model has."""
    common = {field.name for field in dataclasses.fields(PretrainedConfig)}
    own = {field.name for field in dataclasses.fields(type(config))}
    return own - common | set(SAME) | set(RENAMED)


def _check_config(config: PretrainedConfig, family: str) -> None:
    """Refuse what the decoder does not compute.

    Raises:
        ConfigError: names field, value and remedy.
    """

    def refuse(name: str, value: Any, why: str) -> None:
        raise ConfigError(f"{name} {value!r} of the {family} model: {why}")

    if getattr(config, "quantization_config", None) is not None:
        method = getattr(config.quantization_config, "quant_method", config.quantization_config)
        refuse("quantization_config", method, "quantised weights cannot be converted; load without")
    window = getattr(config, "sliding_window", None)
    if window is not None:
        refuse(
            "sliding_window",
            window,
            "the decoder attends to every earlier token; set null, which is the same function for "
            "sequences up to that length",
        )
    kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if kinds:
        refuse("layer_types", kinds, "only full_attention can be converted")
    if getattr(config, "is_heterogeneous", False):
        refuse("per_layer_config", sorted(config.per_layer_attributes), "layers must be alike")
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        refuse("rope_parameters.rope_type", rope, f"use one of {', '.join(ROPE_TYPES)}")
    known = {*SAME, *RENAMED, *NEUTRAL, "sliding_window", "layer_types"}
    known |= {feature.key() for feature in FEATURES}
    for field in dataclasses.fields(type(config)):
        value = getattr(config, field.name, None)
        if field.name in _declared(config) - known and value != field.default:
            refuse(field.name, value, "this field of a newer transformers is unknown here")


def _check_modules(model: nn.Module, family: str) -> None:
    """Refuse modules and weights that are not the family's own: quantised, adapted, patched.

    Raises:
        ConfigError: names the module or weight.
    """
    own = _module(family) if family in FAMILIES else type(model).__module__.rsplit(".", 1)[0]
    for name, module in model.named_modules():
        kind = type(module)
        if not kind.__module__.startswith((own, *PLAIN_MODULES)):
            raise ConfigError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}, not a module of {family}: "
                "convert before adapters, quantization or kernels replace modules"
            )
        # The model's own forward may be wrapped, as by losses that skip the logits: it calls the
        # decoder below it. So may torch's modules, which stay what they are.
        changes = module is not model and not kind.__module__.startswith(PLAIN_MODULES)
        if changes and "forward" in vars(module):
            raise ConfigError(
                f"the forward of {name} was replaced: convert before accelerate's device_map hooks "
                "or fused kernels are installed"
            )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ConfigError(
                f"{name} is a {type(parameter).__qualname__}: convert before weights are "
                "quantised or distributed"
            )
