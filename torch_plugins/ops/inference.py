"""Operators without a gradient, defined so that a call costs little.

``torch.library.custom_op`` enters Python in every call to ask for gradients, for about as long as a
small product of four-bit weights takes. These operators have no autograd kernel; their public
functions refuse inputs that want a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "torch_plugins"


def define(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """``torch.ops.torch_plugins.<name>``: the reference on every device, until a library of native
    code registers a kernel for one. The schema is that of the reference's annotations."""
    schema = torch.library.infer_schema(reference, mutates_args=())
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def refuse_gradient(name: str, x: Tensor) -> None:
    """Raises RuntimeError where autograd would want the gradient of ``x``."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no gradient, and x wants one: call it under torch.no_grad() or "
            "torch.inference_mode()"
        )
