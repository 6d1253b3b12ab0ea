"""What a quantized folder says of itself: its README, and the command's last lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compressed import FORMATS

if TYPE_CHECKING:
    from .quantize import Recipe
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
UNPACKED = "transformers with compressed-tensors unpacks weights to bfloat16 and multiplies in it."
FP4_W4A16 = "Activations are NOT quantized: weights in FP4 only (W4A16). " + UNPACKED
FP4_W4A4 = (
    "Activations are quantized to MXFP4 by transformers with compressed-tensors: where the largest "
    "of a block is 1.75 times a power of two or more, its scale is twice that of OCP MX 1.0 and of "
    "--w4a4-grid mxfp4 in training. " + UNPACKED
)
KERNEL_DECIDES = (
    " vLLM does not ask an MXFP4 folder whether activations are quantized: its kernel decides."
)
GPU = " Products in FP4 are for GPU libraries; none was run with this folder."
INPUTS = {
    "learned": "static, from the clips that training found (arXiv 2404.03605)",
    "dynamic-token": "symmetric, one scale for each token",
    "dynamic-block": "mxfp4, one scale for each 32 features of a token",
    "none": "not quantized",
}
SCALES = {
    "mxfp4": "a power of two for each 32 input features (OCP MX 1.0)",
    "nvfp4": "e4m3 for each 16 input features and one for the whole weight (arXiv 2509.25149), "
    "which q, k and v share, and gate and up",
}


def statement(recipe: Recipe) -> str:
    """What a reader must know of the activations."""
    if recipe.weights != "int4":
        text = FP4_W4A16 if recipe.activations == "none" else FP4_W4A4
        return text + (KERNEL_DECIDES if recipe.weights == "mxfp4" else "") + GPU
    return W4A16 if recipe.activations == "none" else W4A4


def weights(job: Job) -> str:
    """How weights are quantized."""
    recipe = job.recipe
    how = "round to nearest" if recipe.method == "rtn" else "GPTQ (arXiv 2210.17323)"
    if recipe.weights != "int4":
        return f"{recipe.weights}, {SCALES[recipe.weights]}; {how}"
    size = "row" if recipe.group_size == -1 else f"{recipe.group_size} input features"
    if recipe.method == "gptq" and job.calibration_ids is not None:
        ids = job.calibration_ids
        how += f", calibrated on {ids.shape[0]} sequences of {ids.shape[1]} tokens, damping "
        how += f"{recipe.damping:g}" + (", columns by activation" if recipe.act_order else "")
    return f"int4, symmetric, a scale for each {size}; {how}"


def card(job: Job, linears: int, ignore: list[str]) -> str:
    """README.md."""
    recipe = job.recipe
    return f"""# Quantized model

{statement(recipe)}

| | |
|---|---|
| weights | {weights(job)} |
| inputs of linear layers | {INPUTS[recipe.activations]} |
| quantized | {linears} linear layers |
| left as they were | {", ".join(ignore) or "no linear layer"}; embeddings and norms |
| format | compressed-tensors, {FORMATS[recipe.weights]} |

```python
from transformers import AutoModelForCausalLM  # needs compressed-tensors
model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""
