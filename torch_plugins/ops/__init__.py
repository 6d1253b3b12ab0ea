"""Operators in ``torch.ops.torch_plugins``: eager references with exact gradients, and in their
place native code where it is built (``csrc/``)."""

from .. import native

native.load()
