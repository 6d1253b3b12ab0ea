"""The decoder for Hugging Face transformers (5.5 to 5.24), with every plugin feature.

Importing this package registers it with the Auto classes, which the installed entry point does when
they meet its ``model_type``::

    import torch_plugins.hf
    model = AutoModelForCausalLM.from_pretrained(folder)

Without the package, a saved folder carries its code::

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .._autoload import activate
from ..ops import sparse_moe  # noqa: F401  (the decoder finds it)
from .configuration_plugin_decoder import PluginDecoderConfig
from .granite import granite_config
from .modeling_plugin_decoder import PluginDecoderForCausalLM, PluginDecoderModel
from .remote_code import write_remote_code
from .stock import stock_config

__all__ = [
    "PluginDecoderConfig",
    "PluginDecoderForCausalLM",
    "PluginDecoderModel",
    "granite_config",
    "stock_config",
    "write_remote_code",
]

AutoConfig.register(PluginDecoderConfig.model_type, PluginDecoderConfig, exist_ok=True)
AutoModel.register(PluginDecoderConfig, PluginDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(PluginDecoderConfig, PluginDecoderForCausalLM, exist_ok=True)
activate()  # Power LR in Trainer, where no entry point did so
