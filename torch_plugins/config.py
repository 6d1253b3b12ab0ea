"""One frozen dataclass per feature: the single source of Megatron flags, DeepSpeed JSON keys,
Hugging Face config fields and README tables.

A feature named ``ladder-residual`` with the prefix ``ladder`` and a field ``layers``:

=================  ==========================================
Megatron           ``--ladder-residual --ladder-layers SPEC``
DeepSpeed JSON     ``"ladder_residual": {"layers": SPEC}``
Hugging Face       ``config.ladder_residual = {"layers": SPEC}``
=================  ==========================================

Standard library only, and free of relative imports: an exported Hugging Face folder carries it.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, ClassVar


class ConfigError(ValueError):
    """A user's flag, JSON key or config field is wrong; the message names it and the remedy."""


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field that is also a command-line flag, with its help text."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class Feature:
    """Base of every feature's configuration."""

    name: ClassVar[str]
    """The enabling flag without its dashes; with underscores, the JSON key and HF config field."""
    prefix: ClassVar[str]
    """What the flags of the fields start with."""
    title: ClassVar[str]
    paper: ClassVar[str]
    """arXiv id."""

    @classmethod
    def key(cls) -> str:
        """JSON key, HF config field and argparse destination of the enabling flag."""
        return cls.name.replace("-", "_")

    @classmethod
    def flag(cls, field_name: str | None = None) -> str:
        """Flag of one field, or the enabling flag."""
        stem = cls.name if field_name is None else f"{cls.prefix}-{field_name}"
        return "--" + stem.replace("_", "-")

    @classmethod
    def dest(cls, field_name: str) -> str:
        """argparse destination of a field's flag."""
        return cls.flag(field_name)[2:].replace("-", "_")

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> Any:
        """Build from a JSON section; an unknown key is a :class:`ConfigError` with a suggestion."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in section:
            if key not in known:
                raise ConfigError(f"{cls.key()}: unknown key {key!r}{did_you_mean(key, known)}")
        return cls(**section)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LadderResidual(Feature):
    """Ladder Residual: each module reads the residual stream one module early, so that the
    tensor-parallel reduction of its predecessor overlaps its compute.

    ``x_{i+1} = x_i + h_{i+1}(x_{i-1})``, modules h alternating attention and MLP
    (arXiv 2501.06589, section 3).
    """

    name: ClassVar[str] = "ladder-residual"
    prefix: ClassVar[str] = "ladder"
    title: ClassVar[str] = "Ladder Residual"
    paper: ClassVar[str] = "2501.06589"

    layers: str = option(
        "all",
        "Layers that use the ladder: 'all', 'last:N', 'none', a zero-based index, a range 'a-b' "
        "(both included), or a comma list of these.",
        metavar="SPEC",
    )

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """Zero-based indices of the ladder layers, ascending."""
        return parse_layers(self.layers, num_layers, self.flag("layers"))


FEATURES: tuple[type[Feature], ...] = (LadderResidual,)


def did_you_mean(word: str, known: list[str]) -> str:
    """``"; did you mean 'layers'?"``, or the list of what is known when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def parse_layers(spec: str, num_layers: int, source: str = "layers") -> tuple[int, ...]:
    """Turn a layer specification into ascending zero-based indices.

    Args:
        spec: ``all``, ``none``, ``last:N``, or a comma list of indices ``i`` and ranges ``a-b``.
        num_layers: layers of the model.
        source: flag or key named in errors.

    Raises:
        ConfigError: the specification is malformed or names a layer the model does not have.
    """
    text = str(spec).strip().lower()
    if text == "all":
        return tuple(range(num_layers))
    if text == "none":
        return ()
    layers: set[int] = set()
    for part in text.split(","):
        part = part.strip()
        try:
            if part.startswith("last:"):
                count = int(part.removeprefix("last:"))
                if not 0 < count <= num_layers:
                    raise ConfigError(
                        f"{source} {spec!r}: 'last:{count}' of a model with {num_layers} layers; "
                        f"use last:1 to last:{num_layers}"
                    )
                layers.update(range(num_layers - count, num_layers))
                continue
            first, dash, last = part.partition("-")
            chosen = range(int(first), int(last if dash else first) + 1)
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(
                f"{source} {spec!r}: cannot read {part!r}; "
                "use all, none, last:N, an index, a range a-b, or a comma list"
            ) from None
        if not chosen or chosen[-1] >= num_layers:
            raise ConfigError(
                f"{source} {spec!r}: {part!r} is not within layers 0 to {num_layers - 1}"
            )
        layers.update(chosen)
    return tuple(sorted(layers))
