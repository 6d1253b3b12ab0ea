"""Folders with W4A4's clips in ``from_pretrained``: a quantizer in transformers' own registry.

The linear layers that the marker names (:mod:`torch_plugins.w4a4.marker`) become
:class:`~torch_plugins.w4a4.linear.FakeQuantLinear` before the weights are loaded, and the model
that is returned is the one that :func:`~torch_plugins.w4a4.linear.swap` makes: all its parameters
are there and train, any Trainer takes it, and ``save_pretrained`` writes clips and marker again.
Imported by the hooks of ``seams/huggingface.py`` when a folder has the marker.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import ConfigError, DenseMoE
from ..w4a4.linear import swap, targets
from ..w4a4.marker import QUANT_METHOD, SECTION, marker, read
from ..w4a4.quantizer import Mode, quantizers_of, set_mode


class W4A4QuantizationConfig(QuantizationConfigMixin):
    """The marker as transformers holds it while it loads.

    Raises:
        ConfigError: see :func:`torch_plugins.w4a4.marker.read`.
    """

    def __init__(self, **section: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.feature, self.modules = read(section)

    def to_dict(self) -> dict[str, Any]:
        return marker(self.feature, self.modules)


class W4A4Quantizer(HfQuantizer):
    """Makes the linear layers, checks their clips, and leaves a model like any other."""

    requires_calibration = True
    quantization_config: W4A4QuantizationConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if getattr(model.config, DenseMoE.key(), None) is not None:
            raise ConfigError(
                f"{SECTION}: {QUANT_METHOD} with {DenseMoE.key()}: its experts are computed "
                "without their linear layers, which would leave them unquantized"
            )
        feature = replace(config.feature, modules="*")
        unknown = sorted(set(config.modules) - targets(model, feature).keys())
        if unknown:
            raise ConfigError(
                f"{SECTION}.modules: {unknown[0]} is no linear layer of this "
                f"{type(model).__name__}; load the folder as the architecture that it was saved as"
            )
        model.config.quantization_config = config.to_dict()  # as swap expects it
        swap(model, feature, config.modules)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)
        model.config.quantization_config = self.quantization_config.to_dict()
        quantizers = quantizers_of(model)
        for name, quantizer in quantizers.items():
            for clip, parameter in quantizer.named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise ConfigError(
                        f"{name}.{clip}: not in the folder, though {SECTION} says that it is; "
                        f"export it again, or drop {SECTION} from config.json to load plain weights"
                    )
        waiting = [name for name, quantizer in quantizers.items() if quantizer.uncalibrated()]
        if waiting:
            set_mode(quantizers.values(), Mode.OFF)
            warnings.warn(
                f"W4A4: clips of {len(waiting)} linear layers, such as {waiting[0]}, are 0: saved "
                "before they were measured. Nothing is quantized until a training measures them",
                stacklevel=2,
            )
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the method; any number of times."""
    from transformers.quantizers import auto

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(W4A4QuantizationConfig)
        register_quantizer(QUANT_METHOD)(W4A4Quantizer)


register()
