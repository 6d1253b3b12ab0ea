"""Parameter groups that differ in their learning rates only."""

from __future__ import annotations


def tell_apart() -> None:
    """Let a checkpoint's parameter groups be found again by their learning rates too.

    0.17 and 0.18 look only for properties that such groups share, and cannot resume a run that has
    them; 0.19 and newer do as this does.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        known = module.param_group_identifier_keys
        rates = (name for name in ("max_lr", "min_lr") if name not in known)
        module.param_group_identifier_keys = (*known, *rates)
