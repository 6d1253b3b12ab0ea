"""What makes a linear layer hard to quantize, and what quantization costs it; layer by layer.

For a layer with weight W, inputs x and outputs y (C channels of either, over all tokens):

* kurtosis over features, a mean over tokens; see :mod:`torch_plugins.ops.kurtosis`;
* ``max_c m_c / median_c m_c`` with ``m_c = max over tokens |x_c|``: how far the largest channel
  stands out;
* the range of x, and the clips;
* errors relative to what is not quantized, as Euclidean norms over all tokens:
  ``||x - Q(x)|| / ||x||``, ``||W - Q(W)|| / ||W||`` and ``||W x - Q(W) Q(x)|| / ||W x||``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..export.weights import empty
from ..feature import ConfigError
from ..ops.kurtosis import kurtosis
from ..weight_quant import round_to_nearest
from .activations import Input, StaticInput, TokenInput, from_clips, quantizing
from .compressed import (
    GLOBAL,
    INPUT_SCALE,
    INPUT_ZERO,
    PACKED,
    SCALE,
    SHAPE,
    input_from,
    weight_from,
)
from .folder import Folder
from .layers import Passes, batches_of, decoder_layers
from .packed import scheme
from .quantize import BITS, Hooks, Recipe, selected


@dataclass
class Side:
    """Sums over tokens of one side of a layer."""

    kurtosis: float = 0.0
    tokens: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    largest: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Rows ``[tokens, C]`` in fp32."""
        self.kurtosis += float(kurtosis(rows).sum())
        self.tokens += len(rows)
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        most = rows.abs().amax(0)
        self.largest = most if self.largest is None else torch.maximum(self.largest, most)

    @property
    def mean_kurtosis(self) -> float:
        return self.kurtosis / max(self.tokens, 1)

    @property
    def outlier(self) -> float:
        """Largest channel over the median one."""
        if self.largest is None:
            return float("nan")
        return float(self.largest.max() / self.largest.median().clamp(min=1e-12))


@dataclass
class Quantization:
    """One way to quantize a layer, and the squares of its errors."""

    weight: Tensor
    how: Input | None
    inputs: float = 0.0
    outputs: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Inputs, and outputs without bias, of the layer as it is."""
        quantized = x if self.how is None else self.how(x)
        self.inputs += float((quantized - x).square().sum())
        self.outputs += float((F.linear(quantized, self.weight) - y).square().sum())


@dataclass
class Measured:
    """A linear layer, for all its tokens."""

    name: str
    weight: Tensor
    clips: tuple[float, float] | None
    ways: dict[str, Quantization]
    x: Side = field(default_factory=Side)
    y: Side = field(default_factory=Side)
    x_squares: float = 0.0
    y_squares: float = 0.0

    def add(self, x: Tensor, bias: Tensor | None) -> None:
        rows = x.flatten(0, -2).float()
        y = F.linear(rows, self.weight)
        self.x.add(rows)
        self.y.add(y if bias is None else y + bias)
        self.x_squares += float(rows.square().sum())
        self.y_squares += float(y.square().sum())
        for way in self.ways.values():
            way.add(rows, y)

    def row(self) -> dict[str, Any]:
        """For tables and JSON; errors are shares, not percent."""
        errors = {
            name: {
                "inputs": _share(way.inputs, self.x_squares),
                "weights": _share(
                    float((way.weight - self.weight).square().sum()),
                    float(self.weight.square().sum()),
                ),
                "outputs": _share(way.outputs, self.y_squares),
            }
            for name, way in self.ways.items()
        }
        return {
            "layer": self.name,
            "input_kurtosis": self.x.mean_kurtosis,
            "output_kurtosis": self.y.mean_kurtosis,
            "input_outlier": self.x.outlier,
            "output_outlier": self.y.outlier,
            "input_range": [self.x.low, self.x.high],
            "clips": None if self.clips is None else list(self.clips),
            "errors": errors,
        }


def _share(error: float, whole: float) -> float:
    return (error / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def measure(
    source: Folder,
    input_ids: Tensor,
    against: Folder | None = None,
    modules: str = "*",
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each linear layer in the decoder layers, in their order.

    Each has errors of ``nearest``: weights rounded to the nearest of int4 by rows, and inputs as
    the folder's clips say, or else for each token; with ``against`` also of ``quantized``, as that
    folder has them. Between layers go activations of ``source``, inputs quantized where it has
    clips.

    Raises:
        ConfigError: ``against`` is no quantized folder of this model.
    """
    model = source.skeleton()
    found = selected(model, Recipe("rtn", modules=modules))
    prefix, layers = decoder_layers(model)
    inside = {n for n in model.state_dict() if n in source.files and n.startswith(prefix + ".")}
    names = source.files.keys() & model.state_dict().keys()
    source.pour(model, sorted(names - inside), torch.float32)
    rows = []
    with Passes(model, layers, batches_of(input_ids)) as passes:
        for index, layer in enumerate(layers):
            here = f"{prefix}.{index}."
            source.pour(model, sorted(n for n in inside if n.startswith(here)), torch.float32)
            own = {n: model.get_submodule(n) for n in found if n.startswith(here)}
            done = _layer(own, source, against, passes.inputs(index))
            with _quantizing(own, done):
                passes.advance(index)
            rows += [one.row() for one in done.values()]
            empty(layer)
            say(f"layer {index + 1} of {len(layers)}")
    return rows


def _layer(
    own: Mapping[str, Any],
    source: Folder,
    against: Folder | None,
    runs: Iterable[Callable[[], Any]],
) -> dict[str, Measured]:
    done = {name: _start(name, linear, source, against) for name, linear in own.items()}
    with Hooks() as watching:
        for name, linear in own.items():
            watching.before(linear, _adding(done[name]))
        with _quantizing(own, done):
            for run in runs:
                run()
    return done


def _start(name: str, linear: nn.Linear, source: Folder, against: Folder | None) -> Measured:
    weight, both = linear.weight.detach().float(), source.clips(name)
    how: Input = TokenInput(BITS)
    clips = None
    if both is not None and source.feature is not None:
        how = from_clips(name, *both, source.feature.activation_bits)
        clips = how.range()
    ways = {"nearest": Quantization(round_to_nearest(weight, BITS).dequantize(), how)}
    if against is not None:
        ways["quantized"] = quantized(against, name, weight)
    return Measured(name, weight, clips, ways)


def quantized(folder: Folder, name: str, weight: Tensor) -> Quantization:
    """A linear layer as a quantized folder has it; one that it left alone is that of the source."""
    inputs, ignore = scheme(folder)
    if name in ignore:
        return Quantization(weight, None)
    parts = {
        part: folder.get(f"{name}.{part}")
        for part in (PACKED, SCALE, SHAPE, GLOBAL, INPUT_SCALE, INPUT_ZERO)
        if f"{name}.{part}" in folder.files
    }
    stored = weight_from(parts) if PACKED in parts else weight[:0]
    if stored.shape != weight.shape:
        raise ConfigError(f"--against {folder.path}: no {name} of {list(weight.shape)}")
    return Quantization(stored, input_from(inputs, parts))


def _adding(one: Measured) -> Callable[[Any, tuple[Any, ...]], None]:
    return lambda linear, args: one.add(args[0], linear.bias)


def _quantizing(own: Mapping[str, Any], done: Mapping[str, Measured]) -> Hooks:
    """Inputs quantized by the clips of layers that have some."""
    hooks = Hooks()
    for name, linear in own.items():
        how = done[name].ways["nearest"].how
        if isinstance(how, StaticInput):
            hooks.before(linear, quantizing(how))
    return hooks
