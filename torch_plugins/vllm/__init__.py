"""The decoder of ``torch_plugins.hf`` as an out-of-tree model of vLLM.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins`` and calls it in every
process it starts; nothing else does. Importing this package imports neither vLLM nor torch.
"""

ARCHITECTURE = "PluginDecoderForCausalLM"
"""``architectures`` of an exported ``config.json``."""


def register() -> None:
    """Tell vLLM the model, and transformers its configuration; calling it again changes nothing.

    The model is named, not imported: importing it would initialise CUDA before vLLM forks.
    """
    from vllm import ModelRegistry

    import torch_plugins.hf  # noqa: F401  its import registers the configuration

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.plugin_decoder:{ARCHITECTURE}")
