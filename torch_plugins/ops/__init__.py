"""Operators in ``torch.ops.torch_plugins``: eager references with exact gradients, for which native
code may stand in."""
