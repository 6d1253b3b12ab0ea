"""One frozen dataclass per feature: the single source of Megatron flags, DeepSpeed JSON keys,
Hugging Face config fields and README tables.

A feature named ``ladder-residual`` with the prefix ``ladder`` and a field ``layers``:

=================  ==========================================
Megatron           ``--ladder-residual --ladder-layers SPEC``
DeepSpeed JSON     ``"ladder_residual": {"layers": SPEC}``
Hugging Face       ``config.ladder_residual = {"layers": SPEC}``
=================  ==========================================

A feature that an option of the host turns on, as ``--lr-decay-style power`` does, names it in
``switch``.

Standard library only, and free of relative imports: an exported Hugging Face folder carries it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


class ConfigError(ValueError):
    """A user's flag, JSON key or config field is wrong; the message names it and the remedy."""


def option(
    default: Any, help: str, metavar: str | None = None, choices: Sequence[str] | None = None
) -> Any:
    """A dataclass field that is also a command-line flag, with its help text."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


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
    switch: ClassVar[tuple[str, str] | None] = None
    """Megatron's option and its value that turn the feature on, in place of a flag of ours."""
    implied: ClassVar[bool] = False
    """Whether any flag of a field turns the feature on, without the enabling flag."""
    changes_model: ClassVar[bool] = True
    """Whether the same weights compute another function without it: checkpoints are compared."""
    has_section: ClassVar[bool] = True
    """Whether the exported model's ``config.json`` has a section for it."""

    @classmethod
    def key(cls) -> str:
        """JSON key, HF config field and argparse destination of the enabling flag."""
        return cls.name.replace("-", "_")

    @classmethod
    def flag(cls, field_name: str | None = None) -> str:
        """Flag of one field, or what turns the feature on."""
        if field_name is None and cls.switch is not None:
            return " ".join(cls.switch)
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

    def function(self, num_layers: int) -> Any:
        """What of it decides the function of a model's weights; equal for equal functions."""
        return self

    @classmethod
    def where(cls, field_name: str | None = None) -> str:
        """The place of a field outside Megatron, for the documentation."""
        return f"`{cls.key()}`" if field_name is None else f"`{cls.key()}.{field_name}`"

    def _require(self, field_name: str, holds: bool, remedy: str) -> None:
        """Reject the value of a field, by its JSON key and its flag."""
        if not holds:
            value = getattr(self, field_name)
            raise ConfigError(
                f"{self.key()}.{field_name} ({self.flag(field_name)}) {value!r}: {remedy}"
            )


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

    def function(self, num_layers: int) -> Any:
        return self.resolve(num_layers)


DECAY_STYLES = ("exponential", "megatron-exponential", "linear", "cosine")
"""Shapes of the Power LR's last phase; ``torch_plugins/power_lr.py`` has the formulas."""


@dataclass(frozen=True)
class PowerLR(Feature):
    """Power LR: a learning rate that knows neither the horizon nor the batch size of the run.

    ``eta(n) = min(eta_max, beta * a * n ** b)`` after n tokens, beta the global batch in sequences
    of 4096 tokens (arXiv 2408.13359, equations 5 to 8).
    """

    name: ClassVar[str] = "power-lr"
    prefix: ClassVar[str] = "power-lr"
    title: ClassVar[str] = "Power LR"
    paper: ClassVar[str] = "2408.13359"
    switch: ClassVar[tuple[str, str] | None] = ("--lr-decay-style", "power")
    changes_model: ClassVar[bool] = False
    has_section: ClassVar[bool] = False

    a: float = option(4.0, "Amplitude a of min(eta_max, beta * a * n ** b).", metavar="A")
    b: float = option(-0.51, "Exponent b, negative.", metavar="B")
    decay_tokens: int = option(
        0,
        "Length of the last phase, in tokens, which ends with the run; 0 for none. The last phase "
        "can also be given in Megatron's units, --lr-wsd-decay-iters or --lr-wsd-decay-samples.",
        metavar="N",
    )
    decay_style: str = option(
        "exponential", "Shape of the last phase.", metavar="STYLE", choices=DECAY_STYLES
    )

    def __post_init__(self) -> None:
        self._require("a", self.a > 0, "must be positive; the paper uses 4")
        self._require("b", self.b <= 0, "must not be positive; the paper uses -0.51")
        self._require("decay_tokens", self.decay_tokens >= 0, "must not be negative")
        style = self.decay_style
        self._require(
            "decay_style",
            style in DECAY_STYLES,
            f"unknown{did_you_mean(str(style), list(DECAY_STYLES))}",
        )

    @classmethod
    def where(cls, field_name: str | None = None) -> str:
        if field_name is None:
            return '`scheduler.type`: `"PowerLR"`; `lr_scheduler_type`: `"power"`'
        return f"`scheduler.params.{field_name}`, `lr_scheduler_kwargs`"


@dataclass(frozen=True)
class MupPreset:
    """Maximal-update parametrization of a model family (arXiv 2408.13359, tables 1, 3 and 4).

    The width multiplier is ``m = hidden_size / base_width``.
    """

    residual_multiplier: float
    """Scales every attention and MLP output before it is added to the residual stream."""
    embedding_multiplier: float = 12.0
    base_width: int = 256
    init_std: float = 0.1
    """Of embedding and head; hidden matrices have ``init_std / sqrt(m)``."""


MUP_PRESETS = {
    "powerlm-3b": MupPreset(0.22),
    "powermoe-3b": MupPreset(0.22),
    "1b": MupPreset(0.22),
    "1b-moe": MupPreset(0.28),
}


@dataclass(frozen=True)
class PowerMup(Feature):
    """The muP recipe of Power LR, on top of Megatron's ``--use-mup``: a residual multiplier, and
    Adam's epsilon left as it is (arXiv 2408.13359, table 1)."""

    name: ClassVar[str] = "power-mup"
    prefix: ClassVar[str] = "power-mup"
    title: ClassVar[str] = "muP of Power LR"
    paper: ClassVar[str] = "2408.13359"
    implied: ClassVar[bool] = True
    has_section: ClassVar[bool] = False

    preset: str | None = option(
        None,
        "Multipliers of one of the paper's models; Megatron's own --mup-... flags and "
        "--init-method-std go before it.",
        metavar="NAME",
        choices=tuple(MUP_PRESETS),
    )
    residual_multiplier: float | None = option(
        None,
        "Scales every attention and MLP output before it is added to the residual stream; "
        "without a preset 1.",
        metavar="M",
    )

    def __post_init__(self) -> None:
        self._require(
            "preset",
            self.preset is None or self.preset in MUP_PRESETS,
            f"unknown{did_you_mean(str(self.preset), list(MUP_PRESETS))}",
        )
        multiplier = self.residual_multiplier
        self._require(
            "residual_multiplier", multiplier is None or multiplier > 0, "must be positive"
        )

    def multiplier(self) -> float:
        """The residual multiplier: as given, or the preset's, or 1."""
        if self.residual_multiplier is not None:
            return self.residual_multiplier
        return MUP_PRESETS[self.preset].residual_multiplier if self.preset else 1.0

    def function(self, num_layers: int) -> Any:
        return self.multiplier()

    @classmethod
    def where(cls, field_name: str | None = None) -> str:
        if field_name == "residual_multiplier":
            return "`residual_multiplier` of a granite configuration"
        return "the multipliers of a granite configuration"


FEATURES: tuple[type[Feature], ...] = (LadderResidual, PowerLR, PowerMup)


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
