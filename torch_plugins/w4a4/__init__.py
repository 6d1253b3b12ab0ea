"""W4A4 (arXiv 2404.03605): linear layers that train for four bits, and their quantization.

``python -m torch_plugins.w4a4 quantize`` and ``report`` work on Hugging Face folders;
:func:`load_quantized` loads what ``quantize`` writes with four-bit weights in memory.
"""
