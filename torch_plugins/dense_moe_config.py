"""Configuration of DS-MoE; see ``config.py``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .feature import ConfigError, Feature, did_you_mean, option

MI_REDUCTIONS = ("local", "data-parallel")
ROUTERS = ("mlp", "linear")
INFERENCE = ("dense", "top-k", "threshold", "threshold-top-k")
"""Which experts inference computes; ``torch_plugins.dense_moe.keep`` has the rules."""


@dataclass(frozen=True)
class DenseMoEPreset:
    """A model of arXiv 2404.05567, table 1. It has ``attention_experts * heads`` query heads and
    ``heads`` key-value heads, and no biases."""

    hidden_size: int
    num_layers: int
    attention_experts: int
    heads: int
    """Of one attention expert."""
    head_dim: int
    num_experts: int
    ffn_hidden_size: int
    """Of one expert."""
    mi_weight_attention: float
    mi_weight_mlp: float


DENSE_MOE_PRESETS = {
    "1b": DenseMoEPreset(2048, 24, 16, 2, 64, 32, 256, 3.5e-4, 6.3e-4),
    "3b": DenseMoEPreset(3072, 28, 8, 4, 96, 32, 384, 2e-4, 4e-4),
    "6b": DenseMoEPreset(4096, 36, 8, 4, 128, 32, 512, 2e-4, 2e-4),
}


@dataclass(frozen=True)
class DenseMoE(Feature):
    """DS-MoE: every expert trains on every token, and inference computes the few that matter.

    ``O(x) = sum_i S_i(x) e_i(x)`` over all experts, S the softmax of a router; at inference over
    those kept, not renormalized (arXiv 2404.05567, section 2). Fields that are None once built are
    the host's to fill in.
    """

    name: ClassVar[str] = "dense-moe"
    prefix: ClassVar[str] = "dsmoe"
    title: ClassVar[str] = "DS-MoE"
    paper: ClassVar[str] = "2404.05567"
    implied: ClassVar[bool] = True
    changes_tensors: ClassVar[bool] = True

    preset: str | None = option(
        None,
        "Sizes and loss weights of one of the paper's models; what is given beside it goes first.",
        metavar="NAME",
        choices=tuple(DENSE_MOE_PRESETS),
    )
    num_experts: int | None = option(
        None, "MLP experts of a layer; 0 leaves its MLP as it is.", metavar="N"
    )
    ffn_hidden_size: int | None = option(
        None, "Width of one expert; without it the MLP's width over the experts.", metavar="F"
    )
    gated: bool | None = option(
        None, "SwiGLU experts in place of the paper's GELU experts: down(silu(gate(x)) * up(x))."
    )
    attention_experts: int | None = option(
        None,
        "Attention experts of a layer, which share keys and values; 0 leaves its attention as it "
        "is. Each has as many query heads as there are key-value heads.",
        metavar="A",
    )
    router: str = option(
        "mlp",
        "Routers of two matrices, which the paper's parameter counts imply, or of one.",
        metavar="KIND",
        choices=ROUTERS,
    )
    router_hidden_size: int = option(512, "Width inside an mlp router.", metavar="R")
    mi_weight_mlp: float | None = option(
        None,
        "Weight of the mutual-information loss of an MLP's router; the 3B model's 4e-4 without a "
        "preset.",
        metavar="W",
    )
    mi_weight_attention: float | None = option(
        None,
        "The same for an attention's router; the 3B model's 2e-4 without a preset.",
        metavar="W",
    )
    mi_reduction: str = option(
        "local",
        "Whose tokens the mean of the scores in that loss is over: one micro-batch of one process, "
        "or of all data-parallel processes.",
        metavar="KIND",
        choices=MI_REDUCTIONS,
    )
    inference: str = option(
        "dense",
        "MLP experts that evaluation and inference compute: all; the K best; those above the "
        "threshold; or K best, K the mean count above the threshold and at most --dsmoe-top-k.",
        metavar="KIND",
        choices=INFERENCE,
    )
    top_k: int | None = option(None, "MLP experts of a token at inference.", metavar="K")
    threshold: float = option(
        0.48,
        "What N times a score must exceed, N the experts: 1 is a score like all others.",
        metavar="EPS",
    )
    attention_inference: str = option(
        "dense",
        "The same choice for attention experts, of which the paper computes all.",
        metavar="KIND",
        choices=INFERENCE,
    )
    attention_top_k: int | None = option(
        None, "Attention experts of a token at inference.", metavar="K"
    )

    def __post_init__(self) -> None:
        self._choose("preset", self.preset, (None, *DENSE_MOE_PRESETS))
        self._fill_in()
        self._choose("router", self.router, ROUTERS)
        self._choose("mi_reduction", self.mi_reduction, MI_REDUCTIONS)
        for name in ("num_experts", "attention_experts"):
            count = getattr(self, name)
            good = type(count) is int and count >= 0 and count != 1
            self._require(name, good, "must be at least 2, or 0 for none")
        for name in ("ffn_hidden_size", "router_hidden_size", "top_k", "attention_top_k"):
            value = getattr(self, name)
            none = value is None and name != "router_hidden_size"
            self._require(name, none or (type(value) is int and value >= 1), "must be at least 1")
        self._require("gated", type(self.gated) is bool, "must be true or false")
        for name in ("mi_weight_mlp", "mi_weight_attention"):
            weight = getattr(self, name)
            good = isinstance(weight, (int, float)) and weight >= 0
            self._require(name, good, "must be a number, and not negative")
        number = isinstance(self.threshold, (int, float))
        remedy = "must be at least 0 and below 1, so that a token keeps one expert at least"
        self._require("threshold", number and 0 <= self.threshold < 1, remedy)
        if not self.num_experts and not self.attention_experts:
            raise ConfigError(
                f"{self.key()} ({self.flag()}) without experts: give "
                f"{self.spelled('num_experts')} or {self.spelled('attention_experts')}"
            )
        self._check_inference("inference", "top_k", "num_experts")
        self._check_inference("attention_inference", "attention_top_k", "attention_experts")

    def _fill_in(self) -> None:
        """Put the preset's values, or the defaults, in place of None."""
        sizes = DENSE_MOE_PRESETS[self.preset] if self.preset else None
        weights = sizes or DENSE_MOE_PRESETS["3b"]
        for name, value in {
            "num_experts": sizes.num_experts if sizes else 0,
            "attention_experts": sizes.attention_experts if sizes else 0,
            "ffn_hidden_size": sizes.ffn_hidden_size if sizes else None,
            "gated": False,
            "mi_weight_mlp": weights.mi_weight_mlp,
            "mi_weight_attention": weights.mi_weight_attention,
        }.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _choose(self, field_name: str, value: str | None, known: tuple[str | None, ...]) -> None:
        hint = did_you_mean(str(value), [name for name in known if name])
        self._require(field_name, value in known, f"unknown{hint}")

    def _check_inference(self, kind: str, top_k: str, experts: str) -> None:
        """The rule of one kind of experts against its K."""
        rule, k, count = getattr(self, kind), getattr(self, top_k), getattr(self, experts)
        self._choose(kind, rule, INFERENCE)
        self._require(kind, rule == "dense" or count, f"there are no {experts} to choose from")
        self._require(kind, rule != "top-k" or k is not None, f"needs {self.spelled(top_k)}")
        self._require(
            top_k,
            k is None or "top-k" in rule,
            f"does nothing with {self.spelled(kind)} {rule!r}; use top-k or threshold-top-k",
        )
        self._require(top_k, k is None or k <= count, f"there are {count} experts")

    def kept(self, attention: bool = False) -> tuple[int | None, float | None] | None:
        """``top_k`` and ``threshold`` for :func:`torch_plugins.dense_moe.keep`; None: all."""
        rule = self.attention_inference if attention else self.inference
        if rule == "dense":
            return None
        k = self.attention_top_k if attention else self.top_k
        if rule == "threshold-top-k" and k is None:
            k = self.attention_experts if attention else self.num_experts
        return (k if "top-k" in rule else None), (self.threshold if "threshold" in rule else None)

    def function(self, num_layers: int) -> Any:
        """Loss weights and the choice at inference do not decide it."""
        hidden = self.router_hidden_size if self.router == "mlp" else None
        return self.num_experts, self.gated, self.attention_experts, self.router, hidden
