"""Calls of operators that have gradients, without the price of one where none is wanted.

An operator with a gradient in Python enters Python for it in every call, which takes longer than
the operator itself on a few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``; past its gradient where no argument asks for one."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _wanted(args)):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _wanted(args: tuple[Any, ...]) -> bool:
    for arg in args:  # noqa: SIM110  (a generator takes longer than all of this)
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False
