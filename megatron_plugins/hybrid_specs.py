"""``--spec megatron_plugins.hybrid_specs local_stack_spec``: a hybrid stack without
TransformerEngine.

Upstream's stacks are made of TransformerEngine's layers. This one cuts Megatron's local GPT layer
into its attention and its MLP; checkpoints have the same keys as upstream's stacks. It has
attention, MLP and MoE layers, and no Mamba, which has no local form. With or without a plugin flag.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

import megatron_plugins  # noqa: F401  (arms the choke point)
from megatron_plugins import hybrid
from torch_plugins.config import ConfigError

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
except ImportError:  # 0.17
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

_stack_class: Any = HybridStack


class LocalStack(_stack_class):
    """A stack whose final norm is torch's; upstream's is always TransformerEngine's."""

    def __init__(self, config: Any, submodules: Any, **kwargs: Any) -> None:
        post_layer_norm = kwargs.pop("post_layer_norm", True)
        absent = [
            s for s in hybrid.SLOTS if getattr(submodules, hybrid.SLOTS[s], None) is IdentityOp
        ]
        absent = sorted(set(absent) & set(kwargs["layer_type_list"]))
        if absent:  # upstream builds identities
            raise ConfigError(
                f"--spec megatron_plugins.hybrid_specs local_stack_spec: layers "
                f"{', '.join(absent)} of the pattern have no local form; use attention *, MLP - "
                "and MoE E, or TransformerEngine"
            )
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = WrappedTorchNorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def _halves() -> tuple[Any, Any, Any]:
    """Specs of an attention layer, an MLP layer and a MoE layer."""
    dense, moe = get_gpt_layer_local_spec(), get_gpt_layer_local_spec(num_experts=1)
    keys = dense.submodules.sharded_state_dict_keys_map
    attention_keys, mlp_keys = (
        {norm: key for norm, key in keys.items() if norm.startswith(name)}
        for name in ("input_layernorm", "pre_mlp_layernorm")
    )
    without_attention: dict[str, Any] = {
        "input_layernorm": IdentityOp,
        "self_attention": IdentityOp,
        "self_attn_bda": IdentityFuncOp,
        "pre_mlp_layernorm": WrappedTorchNorm,
    }
    attention = replace(
        dense.submodules,
        input_layernorm=WrappedTorchNorm,
        pre_mlp_layernorm=IdentityOp,
        mlp=IdentityOp,
        mlp_bda=IdentityFuncOp,
        sharded_state_dict_keys_map=attention_keys,
    )
    mlp = replace(dense.submodules, **without_attention, sharded_state_dict_keys_map=mlp_keys)
    experts = replace(moe.submodules, **without_attention, sharded_state_dict_keys_map={})
    return (
        replace(dense, submodules=attention),
        replace(dense, module=MLPLayer, submodules=mlp),
        replace(moe, submodules=experts),
    )


_attention, _mlp, _moe = _halves()
local_stack_spec = ModuleSpec(
    module=LocalStack,
    submodules=HybridStackSubmodules(attention_layer=_attention, mlp_layer=_mlp, moe_layer=_moe),
)
