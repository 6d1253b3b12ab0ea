"""Logits of a Hugging Face folder, as a user loads it.

``python -m torch_plugins.export.folder_model FOLDER IDS.pt LOGITS.pt [all-experts] [plain]`` runs
the code that the folder carries: in a process that knows our package, transformers would take the
package's instead. Of W4A4, whose folders carry no code, it is the package's in any case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import W4A4
from ..seams import huggingface, patch
from ..w4a4.quantizer import Mode, quantizers_of, set_mode


def logits(
    folder: Path, input_ids: Tensor, all_experts: bool = False, quantized: bool = True
) -> Tensor:
    """fp32 logits ``[B, S, vocab]`` through ``AutoModelForCausalLM``.

    Args:
        all_experts: compute every expert of DS-MoE, whatever the folder says of inference.
        quantized: quantize the inputs that W4A4 does.

    Raises:
        ValueError: the folder lacks a tensor of the model, or holds another; transformers would
            only warn.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    patch.arm(symbol for symbol in huggingface.HOOKS if symbol.feature == W4A4.key())
    standing: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **standing)
    fp4 = "fp4" in str((getattr(config, "quantization_config", None) or {}).get("format"))
    if all_experts:
        choose_all(config)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **standing
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the tensors do not fit the model: {wrong}")
    if fp4:
        model.hf_quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)  # FP4 unpacks to bfloat16, whatever the model is in
    if not quantized:
        set_mode(quantizers_of(model).values(), Mode.OFF)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=input_ids).logits.float()
    return found


def choose_all(config: Any) -> None:
    """Make a configuration's inference compute all experts of DS-MoE, in place.

    The experts of two implementations are not the same ones where scores nearly tie.
    """
    if getattr(config, "dense_moe", None) is not None:
        chosen = ("inference", "top_k", "attention_inference", "attention_top_k")
        config.dense_moe = {k: v for k, v in config.dense_moe.items() if k not in chosen}
    elif config.model_type in ("qwen2_moe", "qwen3_moe"):
        config.num_experts_per_tok = config.num_experts


def main(folder: str, ids_file: str, logits_file: str, *choice: str) -> None:
    ids = torch.load(ids_file, weights_only=True)
    found = logits(Path(folder), ids, "all-experts" in choice, "plain" not in choice)
    torch.save(found, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
