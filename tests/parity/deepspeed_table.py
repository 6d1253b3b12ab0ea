"""The trainings that test_deepspeed.py runs in both hosts, and the wrong ones that it must tell.

A case is written out for each host by hand, in the host's own terms: flags of Megatron, and a
stock model of transformers with a JSON of DeepSpeed.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from typing import Any

SEQUENCE, BATCH, STEPS = 32, 4, 6
"""Tokens of a sequence, sequences of a step, steps of a training with Power LR."""
RATE, WEIGHT_DECAY, EPSILON = 5e-3, 0.1, 1e-4

FLAGS = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--ffn-hidden-size 96 --group-query-attention --num-query-groups 2 --vocab-size 256 "
    "--untie-embeddings-and-output-weights --tensor-model-parallel-size 2 "
    f"--micro-batch-size 2 --global-batch-size {BATCH} --clip-grad 1 "
    f"--lr {RATE} --weight-decay {WEIGHT_DECAY} --adam-beta2 0.95 --adam-eps {EPSILON} "
)
"""On top of ``tests.megatron.harness.TINY``: 4 layers, width 64."""
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
"""The same model, as transformers says it."""

MUP = {  # m = 64 / 16
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 1 / 16,
    "logits_scaling": 4.0,
}
MUP_FLAGS = "--power-mup-preset powerlm-3b --mup-base-hidden-size 16 "
POWER = {
    "sequence_length": SEQUENCE,
    "a": 1.0,
    "warmup_min_lr": 1e-3,
    "warmup_num_steps": 2,
    "total_num_steps": STEPS,
    "decay_num_steps": 2,
    "decay_style": "linear",
}
POWER_FLAGS = (
    "--lr-decay-style power --power-lr-a 1 --lr-warmup-init 1e-3 --lr-warmup-iters 2 "
    f"--train-iters {STEPS} --power-lr-decay-tokens {2 * BATCH * SEQUENCE} "
    "--power-lr-decay-style linear "
)
LADDER = {"ladder_residual": {"layers": "all"}}
PARTIAL = {"ladder_residual": {"layers": "1-3"}}
SHARED = {"cross_layer_attention": {"sharing_factor": 2}}
EXPERTS = {
    "num_experts": 4,
    "attention_experts": 2,
    "router_hidden_size": 32,
    "mi_weight_mlp": 0.5,
    "mi_weight_attention": 0.3,
    "mi_reduction": "data-parallel",
}
"""A micro-batch of Megatron is one sequence on each rank of DeepSpeed."""
EXPERTS_FLAGS = (
    "--dsmoe-num-experts 4 --dsmoe-attention-experts 2 --dsmoe-gated --dsmoe-router-hidden-size 32 "
    "--dsmoe-mi-weight-mlp 0.5 --dsmoe-mi-weight-attention 0.3 "
)
DESYNC = {"pattern": "3x", "ranks": 2}
DESYNC_FLAGS = "--desync-pattern 3x --sequence-parallel "
CLIPS = {"clip_init": 1, "kurtosis_weight": 0.1, "modules": "*o_proj,*down_proj"}
CLIPS_FLAGS = (
    "--w4a4 --w4a4-clip-init 1 --w4a4-kurtosis-weight 0.1 --w4a4-modules *linear_proj,*linear_fc2 "
)
"""Of linears that no host fuses: where one does, its clips are one pair for all that it fuses."""
KURTOSIS = {"activation_bits": 0, "kurtosis_weight": 0.1}
KURTOSIS_FLAGS = "--w4a4 --w4a4-activation-bits 0 --w4a4-kurtosis-weight 0.1 "
SEPARATE = {"cross_layer_attention": {"pattern": "keep-ends", "kv_norm": "separate"}}


@dataclass(frozen=True)
class Case:
    """One training in both hosts."""

    flags: str = ""
    family: str = "llama"
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the stock configuration, beside :data:`SIZES`."""
    section: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    width_multiplier: float = 1.0
    """m of muP's parameter groups."""
    std: float = 0.15
    """Of the first weights."""

    @property
    def steps(self) -> int:
        return STEPS if self.scheduler else 2


CASES = {
    "standard": Case(),
    "ladder": Case("--ladder-residual ", section=LADDER),
    "sharing": Case("--cla-sharing-factor 2 --add-qkv-bias ", "qwen2", section=SHARED),
    "ladder and sharing": Case(
        "--ladder-residual --ladder-layers 1-3 --cla-pattern keep-ends --cla-kv-norm separate "
        "--qk-layernorm ",
        "qwen3",
        {"head_dim": 16},
        PARTIAL | SEPARATE,
    ),
    "desync": Case(DESYNC_FLAGS, section={"desync_residual": DESYNC}),
    "experts": Case(EXPERTS_FLAGS, section={"dense_moe": EXPERTS}),
    "w4a4": Case(CLIPS_FLAGS, section={"w4a4": CLIPS}),
    "kurtosis": Case(KURTOSIS_FLAGS + "--sequence-parallel ", section={"w4a4": KURTOSIS}),
    "power lr": Case(POWER_FLAGS, scheduler=POWER),
    "mup": Case(MUP_FLAGS, "granite", MUP, width_multiplier=4, std=0.5),
    "together": Case(
        "--sequence-parallel --ladder-residual --cla-sharing-factor 2 " + MUP_FLAGS + POWER_FLAGS,
        "granite",
        MUP,
        LADDER | SHARED,
        POWER,
        width_multiplier=4,
        std=0.5,
    ),
}

TOGETHER = CASES["together"]
WRONG = {
    "ladder: off": ("ladder", "loss", replace(CASES["ladder"], section={})),
    "ladder: one layer less": ("ladder", "loss", replace(CASES["ladder"], section=PARTIAL)),
    "sharing: off": ("sharing", "loss", replace(CASES["sharing"], section={})),
    "sharing: the mean": (
        "sharing",
        "loss",
        replace(CASES["sharing"], section=SHARED | {"kv_init": "mean"}),
    ),
    "ladder and sharing: one norm": (
        "ladder and sharing",
        "names",
        replace(
            CASES["ladder and sharing"],
            section=PARTIAL | {"cross_layer_attention": {"pattern": "keep-ends"}},
        ),
    ),
    "desync: another pattern": (
        "desync",
        "loss",
        replace(CASES["desync"], section={"desync_residual": DESYNC | {"pattern": "2x"}}),
    ),
    "experts: mean of the scores of one rank": (
        "experts",
        "gradients",
        replace(CASES["experts"], section={"dense_moe": EXPERTS | {"mi_reduction": "local"}}),
    ),
    "experts: weight of a loss": (
        "experts",
        "gradients",
        replace(CASES["experts"], section={"dense_moe": EXPERTS | {"mi_weight_attention": 0.31}}),
    ),
    "experts: off": ("experts", "names", replace(CASES["experts"], section={})),
    "w4a4: other clips": (
        "w4a4",
        "loss",
        replace(CASES["w4a4"], section={"w4a4": CLIPS | {"clip_init": 1.1}}),
    ),
    "w4a4: off": ("w4a4", "names", replace(CASES["w4a4"], section={})),
    "kurtosis: one projection less": (
        "kurtosis",
        "gradients",
        replace(CASES["kurtosis"], section={"w4a4": KURTOSIS | {"modules": "!*.3.*k_proj"}}),
    ),
    "power lr: off": ("power lr", "rates", replace(CASES["power lr"], scheduler=None)),
    "power lr: length of a sequence": (
        "power lr",
        "rates",
        replace(CASES["power lr"], scheduler=POWER | {"sequence_length": SEQUENCE + 1}),
    ),
    "mup: one multiplier": (
        "mup",
        "loss",
        replace(CASES["mup"], fields=MUP | {"residual_multiplier": 0.23}),
    ),
    "mup: rates of the base": ("mup", "rates", replace(CASES["mup"], width_multiplier=1.0)),
    "together: ladder off": ("together", "loss", replace(TOGETHER, section=SHARED)),
    "together: sharing off": ("together", "loss", replace(TOGETHER, section=LADDER)),
    "together: power lr off": ("together", "rates", replace(TOGETHER, scheduler=None)),
}
"""Of the DeepSpeed side: the case it stands beside, what of it must differ, and the wrong case."""


def command(case: Case) -> list[str]:
    """Megatron's flags."""
    return shlex.split(FLAGS + case.flags)
