"""Configuration of W4A4; see ``config.py``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from .feature import Feature, did_you_mean, option

GRANULARITIES = ("tensor", "token")
GRIDS = ("int4", "mxfp4", "nvfp4")
BLOCKS = {"mxfp4": 32, "nvfp4": 16}
"""Neighbouring features with one scale, by grid."""
PERCENTILE = "percentile:"


@dataclass(frozen=True)
class W4A4(Feature):
    """Quantization-aware training of linear layers' inputs with learned clips, and a penalty on the
    kurtosis of their outputs (arXiv 2404.03605).

    A linear layer computes ``W Q(x)``, Q the fake quantization of
    :mod:`torch_plugins.ops.fake_quant`, and adds ``kurtosis_weight`` times the mean over tokens of
    the kurtosis of its output to the objective.
    """

    name: ClassVar[str] = "w4a4"
    prefix: ClassVar[str] = "w4a4"
    title: ClassVar[str] = "W4A4"
    paper: ClassVar[str] = "2404.03605"
    has_section: ClassVar[bool] = False

    activation_bits: int = option(
        4, "Bits of the inputs of linear layers, 2 to 8; 0 leaves them as they are.", metavar="B"
    )
    granularity: str = option(
        "tensor",
        "tensor: two learned clips for each linear layer, as in the paper; token: symmetric steps "
        "from the largest feature of each token, nothing learned.",
        metavar="KIND",
        choices=GRANULARITIES,
    )
    symmetric: bool = option(
        False,
        "One learned clip c in place of two: codes -8 to 7 of size 2c/15 (for 4 bits), so that 0 "
        "is a level.",
    )
    clip_init: str = option(
        "percentile:99.9",
        "Where clips start: a value c for +c and -c, or percentile:P, the P-th and (100 - P)-th "
        "percentile of the inputs in the first iteration, which is not quantized.",
        metavar="INIT",
    )
    clip_lr_mult: float = option(
        1.0, "Learning rate of the clips as a multiple of that of the model.", metavar="M"
    )
    kurtosis_weight: float = option(
        1e-5,
        "Weight of the kurtosis of each linear layer's output, a mean over tokens, beside the main "
        "loss; 0 turns it off.",
        metavar="W",
    )
    modules: str = option(
        "*",
        "Linear layers by the host's names for them, such as '*linear_fc2,*linear_proj' (Megatron) "
        "or '*mlp.*' (Hugging Face): a comma list of shell patterns, '!' before one excludes. "
        "Embeddings, the output layer and routers never belong.",
        metavar="PATTERNS",
    )
    weight_bits: int = option(
        0,
        "Bits that weights are fake-quantized to in training too, 2 to 8, symmetric; 0, as in the "
        "paper, leaves them to quantization after training.",
        metavar="B",
    )
    weight_group_size: int = option(
        -1, "Input features of a weight with one scale; -1: an output's whole row.", metavar="N"
    )
    grid: str = option(
        "int4",
        "Levels: evenly spaced (int4), or those of the FP4 formats mxfp4 and nvfp4, whose scales "
        "belong to blocks of 32 or 16 features and are not learned.",
        metavar="GRID",
        choices=GRIDS,
    )
    start_iteration: int = option(
        0, "First iteration that quantizes; the kurtosis counts from the first on.", metavar="N"
    )

    def __post_init__(self) -> None:
        for name in ("activation_bits", "weight_bits"):
            bits = getattr(self, name)
            good = type(bits) is int and (bits == 0 or 2 <= bits <= 8)
            self._require(name, good, "must be 2 to 8, or 0 for none")
        for name, known in (("granularity", GRANULARITIES), ("grid", GRIDS)):
            value = getattr(self, name)
            self._require(name, value in known, f"unknown{did_you_mean(str(value), list(known))}")
        self._require("symmetric", type(self.symmetric) is bool, "must be true or false")
        object.__setattr__(self, "clip_init", str(self.clip_init))
        self._require(
            "clip_init",
            self._init_is_good(),
            "must be a positive number, or percentile:P, P above 50 and at most 100",
        )
        for name in ("clip_lr_mult", "kurtosis_weight"):
            value = getattr(self, name)
            good = type(value) in (int, float) and 0 <= value < float("inf")
            self._require(name, good, "must be a number, and not negative")
        self._require("modules", bool(self._patterns()), "names no pattern; '*' is all")
        size = self.weight_group_size
        good = type(size) is int and (size == -1 or size >= 1)
        self._require("weight_group_size", good, "must be at least 1, or -1 for a whole row")
        start = self.start_iteration
        self._require("start_iteration", type(start) is int and start >= 0, "must not be negative")
        self._check_combinations()

    def _check_combinations(self) -> None:
        on = self.activation_bits or self.weight_bits or self.kurtosis_weight
        self._require(
            "kurtosis_weight", bool(on), "nothing is left to do; give it, or activation_bits"
        )
        fixed = self.granularity == "token" or self.grid != "int4"
        learned = "goes with learned clips only: granularity 'tensor', grid 'int4'"
        self._require("symmetric", not (self.symmetric and fixed), learned)
        self._require(
            "granularity",
            self.granularity == "tensor" or self.grid == "int4",
            f"grid {self.grid!r} has scales of its own for blocks of each token; leave it out",
        )
        if self.grid != "int4":
            for name in ("activation_bits", "weight_bits"):
                remedy = f"grid {self.grid!r} has 4 bits"
                self._require(name, getattr(self, name) in (0, 4), remedy)
            fused = "nvfp4 has a scale for a whole weight, and hosts fuse weights differently"
            both = self.grid == "nvfp4" and self.weight_bits
            self._require("weight_bits", not both, f"{fused}; use mxfp4, or leave it out")
            remedy = f"grid {self.grid!r} has blocks of {BLOCKS[self.grid]}; leave it out"
            self._require("weight_group_size", self.weight_group_size == -1, remedy)

    def _init_is_good(self) -> bool:
        try:
            if self.clip_init.startswith(PERCENTILE):
                return 50 < float(self.clip_init.removeprefix(PERCENTILE)) <= 100
            return 0 < float(self.clip_init) < float("inf")
        except ValueError:
            return False

    @property
    def learned(self) -> bool:
        """Whether linear layers have clips."""
        return bool(self.activation_bits) and self.granularity == "tensor" and self.grid == "int4"

    @property
    def percentile(self) -> float | None:
        """Of the inputs, where clips start there."""
        if not self.clip_init.startswith(PERCENTILE):
            return None
        return float(self.clip_init.removeprefix(PERCENTILE))

    def _patterns(self) -> list[str]:
        words = [word.strip() for word in str(self.modules).split(",")]
        return [word for word in words if word.removeprefix("!")]

    def selects(self, module: str) -> bool:
        """Whether a linear layer of this name belongs: it matches a pattern, and none with ``!``.

        Exclusions alone exclude from all.
        """
        wanted = [word for word in self._patterns() if not word.startswith("!")] or ["*"]
        excluded = [word[1:] for word in self._patterns() if word.startswith("!")]
        matches = any(fnmatchcase(module, word) for word in wanted)
        return matches and not any(fnmatchcase(module, word) for word in excluded)

    def summary(self) -> str:
        """``"inputs 4 bits (learned clips from percentile:99.9), kurtosis 1e-05"``."""
        bits = "{} bits" if self.grid == "int4" else self.grid
        parts = []
        if self.activation_bits:
            how = f"scales of each {'token' if self.grid == 'int4' else 'block'}"
            if self.learned:
                one = "one learned clip" if self.symmetric else "learned clips"
                how = f"{one} from {self.clip_init}"
            parts.append(f"inputs {bits.format(self.activation_bits)} ({how})")
        if self.weight_bits:
            parts.append(f"weights {bits.format(self.weight_bits)}")
        if self.kurtosis_weight:
            parts.append(f"kurtosis {self.kurtosis_weight:g}")
        if self.start_iteration:
            parts.append(f"from iteration {self.start_iteration}")
        return ", ".join(parts)

    def function(self, num_layers: int) -> Any:
        """How clips start and train, and the kurtosis, do not decide it."""
        activations = (self.granularity, self.symmetric) if self.activation_bits else None
        weights = self.weight_group_size if self.weight_bits else None
        bits = self.activation_bits, self.weight_bits
        modules = self.modules if any(bits) else None
        return bits, activations, weights, self.grid if any(bits) else None, modules
