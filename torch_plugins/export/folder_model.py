"""Logits of a Hugging Face folder, as a user loads it.

``python -m torch_plugins.export.folder_model FOLDER IDS.pt LOGITS.pt`` runs the code that the
folder carries: in a process that knows our package, transformers would take the package's instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor


def logits(folder: Path, input_ids: Tensor) -> Tensor:
    """fp32 logits ``[B, S, vocab]`` through ``AutoModelForCausalLM``.

    Raises:
        ValueError: the folder lacks a tensor of the model, or holds another; transformers would
            only warn.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=True,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the tensors do not fit the model: {wrong}")
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=input_ids).logits.float()
    return found


def main(folder: str, ids_file: str, logits_file: str) -> None:
    torch.save(logits(Path(folder), torch.load(ids_file, weights_only=True)), logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
