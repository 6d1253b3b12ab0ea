"""Configuration of Desync Residual.

Standard library only: an exported Hugging Face folder carries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .feature import Feature, option


@dataclass(frozen=True)
class DesyncPlace:
    """What one module (an attention or an MLP) does to the residual streams."""

    inside: bool
    """It reads streams that differ between ranks, each through a norm of the rank's own, or leaves
    such streams behind it; else it is a standard module."""
    enters: bool
    """The stream before it is one for all ranks, that after it is not."""
    leaves: bool
    """The stream before it is not one for all ranks, that after it is."""


@dataclass(frozen=True)
class DesyncResidual(Feature):
    """Desync Residual: most modules do without their tensor-parallel reduction, so that each rank
    has a residual stream, and norms, of its own until a module reduces again.

    With p^r the partial sum of module h on rank r of T::

        x^r = x^r + p^r,            p^r = h^r(norm^r(x^r))       a module that does not reduce
        x   = sum over r of (p^r + x^r / T)                      one that does

    The last module always reduces (the sibling of Ladder Residual in the code of arXiv
    2501.06589). The function depends on T.
    """

    name: ClassVar[str] = "desync-residual"
    prefix: ClassVar[str] = "desync"
    title: ClassVar[str] = "Desync Residual"
    paper: ClassVar[str] = "2501.06589"
    implied: ClassVar[bool] = True
    changes_tensors: ClassVar[bool] = True

    pattern: str = option(
        "2x",
        "Modules that reduce: 'Nx' for every N-th (attention and MLP are one each), 'last', or a "
        "comma list of two digits for attention and MLP of a layer, 1 to reduce, which is repeated "
        "over the layers ('00,01' is 4x). The last module of the model always does.",
        metavar="PATTERN",
    )
    ranks: int | None = option(
        None,
        "Tensor-parallel ranks with a stream of their own; with Megatron, the tensor-parallel "
        "size.",
        metavar="T",
    )

    def __post_init__(self) -> None:
        whole = self.ranks is None or (isinstance(self.ranks, int) and self.ranks >= 2)
        self._require("ranks", whole, "must be a whole number, at least 2")
        self._period()

    def _period(self) -> tuple[bool, ...]:
        """Whether modules reduce, from the first on, to be repeated."""
        text = str(self.pattern)
        if text == "last":
            return (False,)
        if text.endswith("x") and text[:-1].isdecimal() and int(text[:-1]) >= 2:
            return (*[False] * (int(text[:-1]) - 1), True)
        layers = text.split(",")
        listed = all(len(layer) == 2 and set(layer) <= {*"01"} for layer in layers)
        self._require(
            "pattern",
            listed and "0" in text,
            "use Nx with N at least 2, last, or a comma list of 00, 01, 10 and 11, not all of "
            "them 11",
        )
        return tuple(digit == "1" for layer in layers for digit in layer)

    def resolve(self, num_layers: int) -> tuple[bool, ...]:
        """Whether each module reduces: attention and MLP of layer 0, of layer 1, and so on.

        Raises:
            ConfigError: every one does, so that the model would be a standard one; or the list has
                more layers than the model.
        """
        period, count = self._period(), 2 * num_layers
        self._require(
            "pattern",
            "," not in str(self.pattern) or len(period) <= count,
            f"names {len(period) // 2} layers, the model has {num_layers}",
        )
        reduces = [period[module % len(period)] for module in range(count)]
        reduces[-1] = True
        self._require("pattern", not all(reduces), f"every module of {num_layers} layers reduces")
        return tuple(reduces)

    def places(self, num_layers: int) -> tuple[DesyncPlace, ...]:
        """The place of every module, as :meth:`resolve` orders them."""
        reduces = self.resolve(num_layers)
        before = (True, *reduces[:-1])
        return tuple(
            DesyncPlace(inside=not (b and r), enters=b and not r, leaves=r and not b)
            for b, r in zip(before, reduces, strict=True)
        )

    def function(self, num_layers: int) -> Any:
        return self.resolve(num_layers), self.ranks
