"""A correct resume of the distributed optimizer with torch's own Adam.

Without TransformerEngine and apex upstream falls back to torch's Adam, which counts steps in a
tensor per parameter. Its loading code then gives all parameters one shared tensor, which each of
them advances, and copies a fresh zero into it: the run goes on with wrong bias corrections.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from megatron_plugins.cpu.piece import Piece, replace


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of a fresh Adam its state, with a step counter of its own."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
            if "step" not in state:
                state["step"] = torch.tensor(0.0)


def set_step(optimizer: torch.optim.Optimizer, step: float) -> None:
    """Set every parameter's counter to ``step``, each in a tensor of its own."""
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(step))


def _is_torch_adam(distributed: Any) -> bool:
    return isinstance(distributed.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _distributed_optimizer(module: ModuleType) -> None:
    if module.HAVE_APEX_OR_TE:
        return
    owner = module.DistributedOptimizer
    state_dict, load_state_dict = owner.state_dict, owner.load_state_dict
    set_states = owner._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def allocated(self: Any) -> Any:
        if _is_torch_adam(self):
            allocate(self.optimizer)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        if _is_torch_adam(self):
            set_step(self.optimizer, state["optimizer"]["param_groups"][0]["step"])

    @functools.wraps(set_states)
    def without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # Checkpoints keep the step beside the tensors; upstream passes over what is no tensor.
        set_states(self, model_param, {**tensors, "step": None})

    replace(owner, "_set_main_param_and_optimizer_states", without_step)
    replace(owner, "state_dict", allocated)
    replace(owner, "load_state_dict", load)


PIECES = (
    Piece(
        "distributed-optimizer",
        "with torch's Adam upstream cannot load at all, or shares one zeroed step counter among "
        "all parameters",
        "resume with the distributed optimizer",
        modules={"megatron.core.optimizer.distrib_optimizer": _distributed_optimizer},
    ),
)
