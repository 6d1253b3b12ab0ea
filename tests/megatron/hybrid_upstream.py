"""Upstream's hybrid model, the argument that takes its stack's spec, and its own spec of one."""

from __future__ import annotations

try:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as upstream_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    STACK = "hybrid_stack_spec"
except ImportError:  # 0.17
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as upstream_spec
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel

    STACK = "mamba_stack_spec"

__all__ = ["STACK", "HybridModel", "upstream_spec"]
