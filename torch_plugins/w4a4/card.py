"""What a quantized folder says of itself: its README, and the command's last lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .quantize_folder import Job

W4A16 = (
    "Activations are NOT quantized: four-bit weights only (W4A16), which vLLM computes with its "
    "own kernels."
)
W4A4 = (
    "Activations are quantized to four bits by transformers with compressed-tensors, and by "
    "torch_plugins.w4a4.load_quantized. Stock vLLM loads this folder without a warning and ignores "
    "the activation bits: what it computes is W4A16."
)
INPUTS = {
    "learned": "static, from the clips that training found (arXiv 2404.03605)",
    "dynamic-token": "symmetric, one scale for each token",
    "none": "not quantized",
}


def statement(activations: str) -> str:
    """What a reader must know of the activations."""
    return W4A16 if activations == "none" else W4A4


def card(job: Job, linears: int, ignore: list[str]) -> str:
    """README.md."""
    recipe = job.recipe
    size = "row" if recipe.group_size == -1 else f"{recipe.group_size} input features"
    how = "round to nearest" if recipe.method == "rtn" else "GPTQ (arXiv 2210.17323)"
    if recipe.method == "gptq" and job.calibration_ids is not None:
        ids = job.calibration_ids
        how += f", calibrated on {ids.shape[0]} sequences of {ids.shape[1]} tokens, damping "
        how += f"{recipe.damping:g}" + (", columns by activation" if recipe.act_order else "")
    return f"""# Quantized model

{statement(recipe.activations)}

| | |
|---|---|
| weights | int4, symmetric, a scale for each {size}; {how} |
| inputs of linear layers | {INPUTS[recipe.activations]} |
| quantized | {linears} linear layers |
| left as they were | {", ".join(ignore) or "no linear layer"}; embeddings and norms |
| format | compressed-tensors, pack-quantized |

```python
from transformers import AutoModelForCausalLM  # needs compressed-tensors
model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""
