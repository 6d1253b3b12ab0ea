"""What the arms are called, for the files that measure them and those that only read results."""

BF16 = "bf16"
INT8 = ("torch int8 onednn", "torch int8 fbgemm")
INT4_PACK = "torch int4pack"
TORCHAO_INT4 = "torchao W4A8"
TORCHAO_INT8 = "torchao W8A8"
ORT = "ORT MatMulNBits"
GGML = "ggml Q4_0"
LINEAR = {
    "W4A4": (False, 4),
    "W4A8": (False, 8),
    "W4A4 g128": (True, 4),
    "W4A8 g128": (True, 8),
}
"""Our linear layers: whether in groups, bits of inputs."""

MOE_BF16, MOE_INT4 = "native bf16", "native W4A4"
GROUPED, EAGER_EXPERTS = "HF grouped_mm", "HF eager"

FUSED, COMPILED, EAGER = "native", "torch.compile", "torch eager"
ADD_NORM, HF_NORM = "add_ + F.rms_norm", "add + HF RMSNorm"
FEATURES = 4096
"""Of the fused operators' inputs."""

OURS = (*LINEAR, MOE_INT4, MOE_BF16, FUSED)
MAIN = ("W4A4", MOE_INT4, FUSED)
"""Ours that stand for an operator."""
BASES = {
    "linear": BF16,
    "sparse MoE": GROUPED,
    "fake-quant + kurtosis": COMPILED,
    "add + RMSNorm": ADD_NORM,
}
"""Peers that all arms of an operator are compared with."""
