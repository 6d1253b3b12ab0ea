"""A Hugging Face folder becomes a torch_dist checkpoint, without Megatron, process group or GPU.

It is the exporter read backwards: the same table of tensors (``export/mapping.py``), and arguments
that the exporter turns into the folder's configuration again.
"""
