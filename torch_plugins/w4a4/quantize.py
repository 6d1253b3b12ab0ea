"""Four-bit weights for a model in memory, and what folders share with it.

    from torch_plugins.w4a4.quantize import quantize_model
    quantize_model(model, ids, method="gptq", activations="learned", group_size=128)

Layer by layer: the inputs that GPTQ calibrates a layer on come through the layers before it as they
are after quantization, and through the layer's own quantization of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..feature import ConfigError
from ..w4a4_config import BLOCKS, W4A4
from ..weight_quant import Quantized, gptq, round_to_nearest
from .fp4 import QuantizedFP4, largest_of_fused, quantize_fp4
from .layers import Passes, batches_of, decoder_layers
from .linear import FakeQuantLinear, swap, targets
from .quantizer import Mode, quantizers_of, set_mode

METHODS = ("rtn", "gptq")
ACTIVATIONS = ("learned", "dynamic-token", "dynamic-block", "none")
WEIGHTS = ("int4", "mxfp4", "nvfp4")
BITS = 4


@dataclass(frozen=True)
class Recipe:
    """How weights and activations are quantized.

    Attributes:
        method: round to nearest or GPTQ; see :mod:`torch_plugins.weight_quant`.
        activations: inputs of linear layers. ``learned``: clips that training found, static;
            ``dynamic-token``: symmetric, from the largest feature of each token; ``dynamic-block``:
            mxfp4, from the largest of each block; ``none``.
        group_size: input features of a weight with one scale; -1: a row.
        damping, act_order: of GPTQ.
        modules: names of linear layers, as ``W4A4.modules``; those outside of the decoder layers
            never belong.
        weights: evenly spaced, or one of the FP4 grids of :mod:`torch_plugins.ops.dynamic_quant`,
            rounded to nearest.
    """

    method: str = "gptq"
    activations: str = "none"
    group_size: int = -1
    damping: float = 0.01
    act_order: bool = False
    modules: str = "*"
    weights: str = "int4"

    def __post_init__(self) -> None:
        every = (("method", METHODS), ("activations", ACTIVATIONS), ("weights", WEIGHTS))
        for name, known in every:
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name} {value!r}: must be one of {', '.join(known)}")
        size = self.group_size
        if type(size) is not int or not (size == -1 or size >= 1):
            raise ConfigError(f"group_size {size!r}: must be at least 1, or -1 for a whole row")
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"damping {self.damping!r}: must be a positive number, such as 0.01")
        if self.act_order and self.method != "gptq":
            raise ConfigError("act_order: goes with method gptq, which takes columns in turn")
        if self.weights != "int4":
            self._check_fp4()
        elif self.activations == "dynamic-block":
            raise ConfigError(
                "--activations dynamic-block: goes with --weights mxfp4; give dynamic-token"
            )

    def _check_fp4(self) -> None:
        fp4, block = f"--weights {self.weights}", BLOCKS[self.weights]
        if self.method != "rtn":
            raise ConfigError(
                f"--method {self.method}: makes integers only; {fp4} needs --method rtn"
            )
        if self.group_size not in (-1, block):
            raise ConfigError(
                f"--group-size {self.group_size}: {fp4} has blocks of {block}; leave it out"
            )
        if self.activations in ("learned", "dynamic-token"):
            dynamic = ", or dynamic-block" if self.weights == "mxfp4" else ""
            raise ConfigError(
                f"--activations {self.activations}: integers, which nothing multiplies with {fp4}; "
                f"give none{dynamic}"
            )
        if self.activations == "dynamic-block" and self.weights == "nvfp4":
            raise ConfigError(
                f"--activations dynamic-block: with {fp4}, inputs need a scale of the whole layer "
                "from calibration, which is not supported; give none, or --weights mxfp4"
            )

    @property
    def block(self) -> int:
        """Input features of a weight with one scale; -1: a row."""
        return BLOCKS.get(self.weights, self.group_size)

    @property
    def feature(self) -> W4A4:
        """What :func:`~torch_plugins.w4a4.linear.swap` makes of layers without clips."""
        return W4A4(
            activation_bits=BITS, granularity="token", kurtosis_weight=0.0, modules=self.modules
        )


def selected(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """The linear layers to quantize by name: those in decoder layers that ``modules`` selects.

    Raises:
        ConfigError: there is none, or the group size does not divide one's features.
    """
    prefix, _ = decoder_layers(model)
    found = {
        name: linear
        for name, linear in targets(model, recipe.feature).items()
        if name.startswith(prefix + ".")
    }
    if not found:
        raise ConfigError(f"modules {recipe.modules!r}: matches no linear layer in {prefix}")
    for name, linear in found.items():
        if recipe.block == -1 or not linear.in_features % recipe.block:
            continue
        if recipe.weights != "int4":
            raise ConfigError(
                f"--weights {recipe.weights}: its blocks of {recipe.block} do not divide the "
                f"{linear.in_features} input features of {name}; exclude it with --modules "
                f"'!{name}', or give --weights int4"
            )
        raise ConfigError(
            f"group_size {recipe.group_size}: does not divide the {linear.in_features} input "
            f"features of {name}; give a divisor, -1, or exclude it with modules '!{name}'"
        )
    return found


def check_calibration(input_ids: Tensor | None, recipe: Recipe) -> None:
    """Raise :class:`ConfigError` where GPTQ has no tokens, or they have another shape."""
    if recipe.method == "gptq" and input_ids is None:
        raise ConfigError("method gptq: needs calibration tokens; give some, or use method rtn")
    if input_ids is not None and (input_ids.ndim != 2 or not input_ids.numel()):
        raise ConfigError(
            f"calibration: shape {list(input_ids.shape)}; must be [sequences, tokens]"
        )


def hessians(
    linears: Mapping[str, nn.Linear], inputs: Iterable[Callable[[], Any]]
) -> dict[str, Tensor]:
    """``X^T X`` in fp32 of each linear layer's quantized inputs, by name.

    Args:
        inputs: functions that run the layers on a batch.
    """
    sums: dict[str, Tensor] = {}
    with Hooks() as hooks:
        for name, linear in linears.items():
            hooks.before(linear, _adder(sums, name))
        for run in inputs:
            run()
    return sums


class Hooks:
    """Hooks before modules' forwards, removed at the end of a ``with``."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, hook: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        self.handles.append(module.register_forward_pre_hook(hook))


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[Any, tuple[Any, ...]], None]:
    def add(linear: Any, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        if isinstance(linear, FakeQuantLinear) and linear.input_quantizer is not None:
            x = linear.input_quantizer(x)
        rows = x.flatten(0, -2).float()
        product = rows.T @ rows
        sums[name] = sums[name] + product if name in sums else product

    return add


def quantize_weight(
    weight_OI: Tensor,
    hessian_II: Tensor | None,
    recipe: Recipe,
    scale_dtype: torch.dtype | None = None,
) -> Quantized:
    """One weight as the recipe says; a layer that no calibration token reached is rounded."""
    size = recipe.group_size
    if recipe.method == "rtn" or hessian_II is None:
        return round_to_nearest(weight_OI, BITS, size, scale_dtype)
    try:
        return gptq(
            weight_OI, hessian_II, BITS, size, recipe.damping, recipe.act_order, scale_dtype
        )
    except torch.linalg.LinAlgError as error:
        raise ConfigError(
            f"damping {recipe.damping:g}: the Hessian of the calibration tokens cannot be "
            "factorized; give a larger one, or more tokens"
        ) from error


def quantize_layers(
    own: Mapping[str, nn.Linear],
    hessians_II: Mapping[str, Tensor],
    recipe: Recipe,
    scale_dtype: torch.dtype | None = None,
) -> dict[str, Quantized | QuantizedFP4]:
    """Weights of one decoder layer as the recipe says, by name.

    Raises:
        ConfigError: see :func:`quantize_weight`, and :func:`~torch_plugins.w4a4.fp4.quantize_fp4`.
    """
    if recipe.weights == "int4":
        return {
            name: quantize_weight(linear.weight, hessians_II.get(name), recipe, scale_dtype)
            for name, linear in own.items()
        }
    largest = largest_of_fused(own) if recipe.weights == "nvfp4" else {}
    return {
        name: quantize_fp4(linear.weight, recipe.weights, largest.get(name), name)
        for name, linear in own.items()
    }


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    calibration_ids: Tensor | None = None,
    *,
    method: str = "gptq",
    activations: str = "none",
    group_size: int = -1,
    damping: float = 0.01,
    act_order: bool = False,
    modules: str = "*",
    weights: str = "int4",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Quantized | QuantizedFP4]:
    """Quantize the linear layers in a model's decoder layers, in place.

    Afterwards weights have the values ``code * scale`` in their own dtype (FP4 takes a level for a
    code), and inputs are
    quantized: as trained (``learned``), for each token (``dynamic-token``: the layers become
    :class:`~torch_plugins.w4a4.linear.FakeQuantLinear`), or not at all (``none``: quantizers that
    are there are turned off).

    Args:
        model: a causal language model of transformers, or any that gives ``.logits`` for
            ``input_ids`` and has its decoder layers in an ``nn.ModuleList``.
        calibration_ids: token ids ``[sequences, tokens]`` on the model's device; ``rtn`` needs
            none.
        say: told of each layer.

    Returns:
        Codes and scales by the linear layer's name.

    Raises:
        ConfigError: a value is wrong, tokens are missing, or ``learned`` finds no clips; the model
            is unchanged then.
    """
    recipe = Recipe(method, activations, group_size, damping, act_order, modules, weights)
    if activations == "dynamic-block":
        raise ConfigError("activations dynamic-block: of folders only; give activations none")
    check_calibration(calibration_ids, recipe)
    found = selected(model, recipe)
    _prepare(model, found, recipe)
    prefix, layers = decoder_layers(model)
    batches = [] if method == "rtn" or calibration_ids is None else batches_of(calibration_ids)
    done: dict[str, Quantized | QuantizedFP4] = {}
    with evaluating(model), Passes(model, layers, batches) as passes:
        for index in range(len(layers)):
            own = {n: m for n, m in found.items() if n.startswith(f"{prefix}.{index}.")}
            say(f"layer {index + 1} of {len(layers)}: {len(own)} linear layers")
            sums = hessians(own, passes.inputs(index)) if own else {}
            done |= quantize_layers(own, sums, recipe)
            for name, linear in own.items():
                linear.weight.copy_(done[name].dequantize())
            passes.advance(index)
    return done


def _prepare(model: nn.Module, found: Mapping[str, nn.Linear], recipe: Recipe) -> None:
    """Have the inputs of linear layers quantized as the recipe says."""
    if recipe.activations == "dynamic-token":
        swap(model, recipe.feature, found)
    elif recipe.activations == "none":
        for linear in found.values():
            set_mode(quantizers_of(linear).values(), Mode.OFF)
    else:
        check_learned(found)


def check_learned(found: Mapping[str, nn.Linear]) -> None:
    """Raise :class:`ConfigError` where a linear layer has no clips, or clips that are still 0."""
    for name, linear in found.items():
        quantizer = getattr(linear, "input_quantizer", None)
        if quantizer is None or not quantizer.feature.learned:
            raise ConfigError(f"activations learned: {name} has no clips; {NO_CLIPS}")
        if quantizer.uncalibrated():
            raise ConfigError(f"activations learned: the clips of {name} are 0; {NO_CLIPS}")


NO_CLIPS = (
    "train the model with W4A4 first, give activations dynamic-token, or leave such layers out "
    "with modules"
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
