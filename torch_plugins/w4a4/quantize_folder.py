"""Quantize a Hugging Face folder layer by layer, write it, and prove what was written.

In memory are the model's embeddings, one decoder layer, and what the calibration tokens are on the
way from one layer to the next. The proof alone loads the whole quantized model, as a user does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export.proof import Verdict, VerificationError, folder_logits, random_ids, tolerance
from ..export.weights import empty, fill
from ..export.writer import check_output, new_folder, write_weights
from ..feature import ConfigError
from .activations import BlockInput, Input, TokenInput, from_clips, quantizing
from .card import card
from .compressed import (
    QuantizedWeights,
    input_tensors,
    section,
    weight_from,
    weight_tensors,
)
from .folder import Folder, cast
from .layers import Passes, batches_of, decoder_layers
from .marker import SECTION
from .quantize import (
    NO_CLIPS,
    Hooks,
    Recipe,
    check_calibration,
    hessians,
    quantize_layers,
    selected,
)
from .state import State

Say = Callable[[str], None]
KEPT = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
"""Files of the source that a quantized folder has too; ``config.json`` and indices are written."""


@dataclass(frozen=True)
class Job:
    """One run of the command.

    Attributes:
        calibration_ids: ``[sequences, tokens]``, or None.
        dtype: of the written floating-point tensors; None: as the source has them.
        device: where layers are computed.
        force: replace a model folder at ``output``.
        restart: forget an interrupted run.
    """

    source: Folder
    output: Path
    recipe: Recipe
    calibration_ids: Tensor | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    force: bool = False
    restart: bool = False
    max_shard_size: str = "5GB"


def quantize_folder(job: Job, say: Say) -> Verdict:
    """Everything; returns how far the written model's logits are from the quantized model's.

    Raises:
        ConfigError: the folder cannot be quantized so; nothing was written.
        VerificationError: the written folder computes something else; nothing is left of it.
    """
    check_output(job.output, job.force)
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError("compressed-tensors is not installed: pip install compressed-tensors")
    check_calibration(job.calibration_ids, job.recipe)
    check_dtype(job)
    model = job.source.skeleton()
    inputs = input_quantizers(model, job)
    state = State(job.output, fingerprint(job), job.restart)
    logits = run(model, inputs, job, state, say)
    with new_folder(job.output, job.force) as folder:
        write(folder, model, inputs, job, state, say)
        say("loading what was written, as transformers does")
        verdict = prove(folder, model.config, logits)
        if not verdict.equal:
            state.remove()
            raise VerificationError(
                f"the written model computes something else: {verdict}; nothing is left of it"
            )
    state.remove()
    return verdict


def scale_dtype(job: Job) -> torch.dtype:
    """Of int4 scales: in a narrower dtype, compressed-tensors would round their products to it."""
    return job.dtype or torch.float32


def check_dtype(job: Job) -> None:
    """Raise :class:`ConfigError` where FP4 would unpack to another dtype than the model has."""
    weights, fields = job.recipe.weights, job.source.fields
    stored = job.dtype or fields.get("dtype") or fields.get("torch_dtype") or "float32"
    dtype = str(stored).removeprefix("torch.")
    if weights != "int4" and dtype != "bfloat16":
        raise ConfigError(
            f"--weights {weights}: {job.source.path if job.dtype is None else '--dtype'} is "
            f"{dtype}, but transformers unpacks FP4 to bfloat16; give --dtype bfloat16"
        )


def input_quantizers(model: nn.Module, job: Job) -> dict[str, Input | None]:
    """The linear layers to quantize, and how their inputs are.

    Raises:
        ConfigError: a layer has no clips and should have some.
    """
    found, source, recipe = selected(model, job.recipe), job.source, job.recipe
    if recipe.activations == "none":
        return dict.fromkeys(found)
    if recipe.activations == "dynamic-token":
        return dict.fromkeys(found, TokenInput())
    if recipe.activations == "dynamic-block":
        return dict.fromkeys(found, BlockInput())
    feature = source.feature
    if feature is None or not feature.learned:
        raise ConfigError(f"--activations learned: {source.path} has no clips; {NO_CLIPS}")
    if recipe.modules == "*":
        found = {name: linear for name, linear in found.items() if name in source.modules}
    clips: dict[str, Input | None] = {}
    for name in found:
        both = source.clips(name)
        if both is None:
            raise ConfigError(f"--activations learned: {name} has no clips; {NO_CLIPS}")
        clips[name] = from_clips(name, *both, feature.activation_bits)
    return clips


def fingerprint(job: Job) -> dict[str, Any]:
    """What decides the codes."""
    ids = job.calibration_ids
    return asdict(job.recipe) | {
        "model": job.source.digest(),
        "calibration": None if ids is None else _hash(ids),
        "dtype": str(job.dtype),
    }


def _hash(ids: Tensor) -> str:
    shaped = f"{list(ids.shape)}".encode() + ids.contiguous().numpy().tobytes()
    return hashlib.sha256(shaped).hexdigest()


@torch.no_grad()
def run(model: Any, inputs: Mapping[str, Input | None], job: Job, state: State, say: Say) -> Tensor:
    """Quantize all layers into ``state``; returns logits of the quantized model."""
    prefix, layers = decoder_layers(model)
    source, gptq = job.source, job.recipe.method == "gptq"
    names = [name for name in model.state_dict() if name in source.files]
    outside = [name for name in names if not name.startswith(prefix + ".")]
    fill(model, _read(job, outside))
    ties = source.tied(model)
    fill(model, zip(ties, (tensor for _, tensor in _read(job, ties.values())), strict=True))
    ids = job.calibration_ids
    batches = batches_of(ids) if gptq and ids is not None else []
    device = None if job.device == "cpu" else job.device
    with Passes(model, layers, batches, random_ids(model.config), device) as passes:
        for index, layer in enumerate(layers):
            start, here = time.monotonic(), f"{prefix}.{index}."
            fill(model, _read(job, [name for name in names if name.startswith(here)]))
            layer.to(job.device)
            own = {n: model.get_submodule(n) for n in inputs if n.startswith(here)}
            with quantized_inputs(own, inputs):
                news = "resumed" if state.has(index) else "quantized"
                if news == "quantized":
                    sums = hessians(own, passes.inputs(index)) if gptq else {}
                    state.save(index, _quantize(own, sums, job))
                for name, tensors in by_linear(state.load(index)).items():
                    weight = weight_from(tensors).to(job.device)
                    fill(model, [(f"{name}.weight", weight)])
                passes.advance(index)
            empty(layer)
            took = time.monotonic() - start
            say(
                f"layer {index + 1} of {len(layers)}: {len(own)} linear layers {news}, {took:.1f} s"
            )
        return passes.logits().float()


def _read(job: Job, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, cast(cast(job.source.get(name), job.dtype), torch.float32)) for name in names)


def _quantize(own: Mapping[str, Any], sums: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
    found = {}
    for name, weight in quantize_layers(own, sums, job.recipe, scale_dtype(job)).items():
        for part, tensor in weight_tensors(weight, scale_dtype(job)).items():
            found[f"{name}.{part}"] = tensor.cpu()
    return found


def quantized_inputs(own: Mapping[str, nn.Module], inputs: Mapping[str, Input | None]) -> Hooks:
    """Hooks that quantize what linear layers are given, until a ``with`` ends."""
    hooks = Hooks()
    for name, linear in own.items():
        how = inputs[name]
        if how is not None:
            hooks.before(linear, quantizing(how))
    return hooks


def by_linear(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Names ``linear.part`` as linear layer, then part."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        found.setdefault(linear, {})[part] = tensor
    return found


def write(
    folder: Path, model: Any, inputs: Mapping[str, Input | None], job: Job, state: State, say: Say
) -> None:
    """All files of the quantized model."""
    source, stored = job.source, {}
    for index in range(len(decoder_layers(model)[1])):
        for name, tensors in by_linear(state.load(index)).items():
            stored[name] = tensors | input_tensors(inputs[name])
    known = set(model.state_dict())
    weights = QuantizedWeights(source, job.dtype, stored, known)
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    ignore = [name for name in linears if name not in inputs]
    recipe = job.recipe
    how = section(recipe.group_size, next(iter(inputs.values())), ignore, recipe.weights)
    fields = source.fields | {SECTION: how}
    if job.dtype is not None:
        fields.pop("torch_dtype", None)
        fields["dtype"] = str(job.dtype).removeprefix("torch.")
    for pattern in KEPT:
        for path in source.path.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "README.md").write_text(card(job, len(inputs), ignore))
    write_weights(folder, weights, job.max_shard_size, say)


def prove(folder: Path, config: Any, logits: Tensor) -> Verdict:
    """Compare with what the folder computes on the same tokens, without this package's layers."""
    found = folder_logits(folder, random_ids(config))
    difference = (found - logits).abs().max().item()
    return Verdict("the model that was quantized", difference, tolerance(config, logits))
