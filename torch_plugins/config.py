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

Standard library only: an exported Hugging Face folder carries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .dense_moe_config import DenseMoE
from .desync_config import DesyncResidual
from .feature import ConfigError, Feature, did_you_mean, option
from .w4a4_config import W4A4

__all__ = [
    "FEATURES",
    "W4A4",
    "ConfigError",
    "DenseMoE",
    "DesyncResidual",
    "Feature",
    "did_you_mean",
    "option",
    "parse_layers",
]


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
        return parse_layers(self.layers, num_layers, self.spelled("layers"))

    def function(self, num_layers: int) -> Any:
        return self.resolve(num_layers)


CLA_PATTERNS = ("keep-ends", "dense-front", "dense-back")
"""Named patterns of arXiv 2405.12981, figure 4."""

KV_NORMS = ("shared", "separate")


@dataclass(frozen=True)
class CrossLayerAttention(Feature):
    """Cross-Layer Attention: neighbouring layers attend to the keys and values of one of them.

    A *producer* projects its own keys and values; the *consumers* behind it have only queries, and
    read the producer's (arXiv 2405.12981, section 2).
    """

    name: ClassVar[str] = "cross-layer-attention"
    prefix: ClassVar[str] = "cla"
    title: ClassVar[str] = "Cross-Layer Attention"
    paper: ClassVar[str] = "2405.12981"
    implied: ClassVar[bool] = True
    changes_tensors: ClassVar[bool] = True

    sharing_factor: int | None = option(
        None,
        "Layers that share one set of keys and values; where it does not divide the layers, the "
        "first group is the short one. 2 without a pattern.",
        metavar="N",
    )
    pattern: str | None = option(
        None,
        "In place of a sharing factor: the producer of every layer (of a hybrid model, of every "
        "attention layer) as a comma list (0,0,2,2,...), or keep-ends, dense-front, dense-back.",
        metavar="PATTERN",
    )
    kv_norm: str = option(
        "shared",
        "Whether a producer's keys and values read the norm of its queries, as in stock "
        "checkpoints, or one of their own, as in the paper.",
        metavar="KIND",
        choices=KV_NORMS,
    )

    def __post_init__(self) -> None:
        factor = self.sharing_factor
        self._require(
            "pattern",
            self.pattern is None or factor is None,
            f"give either a pattern or a sharing factor ({factor}), not both",
        )
        whole = factor is None or (isinstance(factor, int) and factor >= 1)
        self._require("sharing_factor", whole, "must be a whole number of layers, at least 1")
        self._require(
            "kv_norm",
            self.kv_norm in KV_NORMS,
            f"unknown{did_you_mean(str(self.kv_norm), list(KV_NORMS))}",
        )

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """The producer of every layer, zero-based: a layer that names itself is a producer.

        ``keep-ends``: all but the first and last layer in pairs. ``dense-front``: one group from
        the middle to the last but one. ``dense-back``: one group from layer 1 to the middle.

        Raises:
            ConfigError: the pattern or factor does not fit the number of layers.
        """
        if self.pattern is None:
            factor = self.sharing_factor or 2
            self._require(
                "sharing_factor", factor <= num_layers, f"the model has {num_layers} layers"
            )
            return _groups(0, num_layers, factor)
        half, last = num_layers // 2, num_layers - 1
        if self.pattern in CLA_PATTERNS:
            self._require("pattern", num_layers >= 4, f"needs 4 layers, the model has {num_layers}")
        if self.pattern == "keep-ends":
            return (0, *_groups(1, last, 2), last)
        if self.pattern == "dense-front":
            return (*range(half), *[half - 1] * (last - half), last)
        if self.pattern == "dense-back":
            return (0, *[1] * half, *range(half + 1, num_layers))
        return self._listed(num_layers)

    def _listed(self, num_layers: int) -> tuple[int, ...]:
        """An explicit pattern, checked."""
        try:
            producers = tuple(int(part) for part in str(self.pattern).split(","))
        except ValueError:
            names = ", ".join(CLA_PATTERNS)
            self._require("pattern", False, f"use a comma list of producers, or {names}")
            raise
        self._require(
            "pattern",
            len(producers) == num_layers,
            f"names {len(producers)} producers for {num_layers} layers",
        )
        for layer, producer in enumerate(producers):
            before = producers[layer - 1] if layer else 0
            self._require(
                "pattern",
                producer in (layer, before),
                f"layer {layer} must be its own producer, {layer}, or share that of the layer "
                f"before it, {before}",
            )
        return producers

    def function(self, num_layers: int) -> Any:
        return self.resolve(num_layers), self.kv_norm


def _groups(first: int, end: int, size: int) -> tuple[int, ...]:
    """Producers of the layers ``first`` to ``end - 1`` in groups of ``size``, a short one first."""
    short = (end - first) % size
    return tuple(
        first if layer < first + short else layer - (layer - first - short) % size
        for layer in range(first, end)
    )


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
        for name in ("a", "b", "decay_tokens"):
            number = isinstance(getattr(self, name), (int, float))
            self._require(name, number, "must be a number")
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
"""PowerLM-3B, PowerMoE-3B, and the 1B models, dense and mixture-of-experts. The width multiplier of
PowerLM-3B, 2304 wide, is 9 by these; the paper prints 8."""


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
        if field_name == "preset":
            return "`torch_plugins.hf.granite_config(preset, ...)`"
        return "`torch_plugins.mup`"


FEATURES: tuple[type[Feature], ...] = (
    LadderResidual,
    DesyncResidual,
    DenseMoE,
    CrossLayerAttention,
    W4A4,
    PowerLR,
    PowerMup,
)


def parse_layers(spec: str, num_layers: int, source: str = "layers") -> tuple[int, ...]:
    """Turn a layer specification into ascending zero-based indices.

    Args:
        spec: ``all``, ``none``, ``last:N``, or a comma list of indices ``i`` and ranges ``a-b``.
        num_layers: layers of the model.
        source: flag or key to name in errors.

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
