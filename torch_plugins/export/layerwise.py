"""Logits of a folder through transformers' own forward, with the weights of one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .folder import EMBEDDING, HEAD, Folder
from .weights import empty, fill


@torch.no_grad()
def folder_logits(folder: Folder, input_ids: Tensor) -> Tensor:
    """fp32 logits ``[B, S, vocab]``.

    The model has no memory; embedding, layer, norm and head get their weights when their turn
    comes, and lose them when it is over.
    """
    model = folder.skeleton()
    base = model.model
    base.rotary_emb = type(base.rotary_emb)(folder.config)  # its buffers are no weights
    units = {
        "model.embed_tokens": base.embed_tokens,
        **{f"model.layers.{index}": layer for index, layer in enumerate(base.layers)},
        "model.norm": base.norm,
        "lm_head": model.lm_head,
    }
    for name, module in units.items():
        module.register_forward_pre_hook(_filling(folder, name))
        module.register_forward_hook(_emptying)
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits.float()
    return logits


def _filling(folder: Folder, prefix: str) -> Callable[..., None]:
    def before(module: nn.Module, inputs: Any) -> None:
        names = [name for name, _ in module.named_parameters()]
        fill(module, ((name, folder.read(stored(f"{prefix}.{name}")).float()) for name in names))

    def stored(name: str) -> str:
        return EMBEDDING if name == HEAD and HEAD not in folder.shapes else name

    return before


def _emptying(module: nn.Module, inputs: Any, output: Any) -> None:
    empty(module)
