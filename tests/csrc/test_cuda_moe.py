"""Mixtures of experts in ``csrc/cuda``, run by the emulator."""

import pytest
import torch

from tests.csrc.cuda_emulation import KINDS, Emulator, Out, build
from torch_plugins.ops import sparse_moe as moe
from torch_plugins.ops.int4 import pack_int4

ACTIVATIONS = list(moe.ACTIVATIONS)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    # So little memory that tokens go through in parts; see the sizes below.
    little = ("sparse_moe.cuh", "int64_t(256) << 20", "27 * 4 * (3 * 24 + 42) * 4")
    threads = ("experts.cuh", "EXPERT_THREADS = 256", "EXPERT_THREADS = 64")
    emulator = Emulator(build("moe", tmp_path_factory.mktemp("moe"), [little, threads]))
    yield emulator
    emulator.close()


def routing(tokens, experts, dtype=torch.float32):
    """Scores of all, and about half of the experts kept: one by no token, and one by every token
    or one token keeps none."""
    torch.manual_seed(tokens)
    scores, kept = torch.rand(tokens, experts).to(dtype), torch.rand(tokens, experts) > 0.5
    kept[:, experts // 2] = False
    if tokens % 2:
        kept[tokens // 2] = False
    else:
        kept[:, -1] = True
    return scores, kept


@pytest.mark.parametrize(
    ("tokens", "width", "gated", "activation", "dtype"),
    [
        (3, 24, True, "silu", torch.float32),
        (46, 24, True, "gelu", torch.float32),
        (21, 72, False, "gelu_tanh", torch.bfloat16),
        (46, 20, True, "silu", torch.float16),
        (1, 24, True, "relu", torch.float16),
        (5, 24, False, "silu", torch.float64),
    ],
)
def test_sparse_moe(emulator, tokens, width, gated, activation, dtype):
    experts, hidden = 4, 42
    scores, kept = routing(tokens, experts, dtype if tokens == 21 else torch.float32)
    x = torch.randn(tokens, hidden).to(dtype)
    gate, up = torch.randn(2, experts, width, hidden).to(dtype) / 4
    down = (torch.randn(hidden, experts * width).to(dtype) / 4).unflatten(1, (experts, width))
    down = down.transpose(0, 1)  # a view [N, D, F] of [D, N F]
    kept[:, 1], down[1] = False, torch.inf  # beside what others read
    gate = gate if gated else None
    sizes = tokens, hidden, experts, width, hidden, gated, ACTIVATIONS.index(activation)
    (y,) = emulator.run(
        "sparse_moe",
        *(x, scores, kept, gate, up, down.transpose(0, 1), Out(x.shape, dtype)),
        *(KINDS[dtype], KINDS[scores.dtype], *sizes, width, experts * width),
        seed=tokens,
    )
    expected = moe.sparse_moe_reference(x, scores, kept, gate, up, down, activation)
    error = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(y, expected, rtol=error, atol=error)


def test_more_tokens_than_threads(emulator):
    tokens, hidden, width, experts = 150, 3, 2, 2
    scores, kept = routing(tokens, experts)
    x, up = torch.randn(tokens, hidden), torch.randn(experts, width, hidden)
    down = torch.randn(experts, hidden, width)
    sizes = tokens, hidden, experts, width, hidden, False, ACTIVATIONS.index("relu")
    expected = moe.sparse_moe_reference(x, scores, kept, None, up, down, "relu")
    for seed in range(8):
        arguments = x, scores, kept, None, up, down, Out(x.shape), 0, 0
        (y,) = emulator.run("sparse_moe", *arguments, *sizes, hidden * width, width, seed=seed)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("int4", [True, False])
@pytest.mark.parametrize(
    ("tokens", "gated", "activation", "dtype"),
    [(3, True, "relu", torch.float32), (44, False, "relu", torch.bfloat16)],
)
def test_w4a4_sparse_moe_is_exact(emulator, tokens, gated, activation, dtype, int4):
    experts, hidden, width, groups = 4, 42, 24, 3
    scores, kept = routing(tokens, experts)
    x = torch.randn(tokens, hidden).to(dtype)
    inner = 2 * width if gated else width
    gate_up = pack_int4(torch.randint(-8, 8, (experts, inner, hidden), dtype=torch.int8))
    down = pack_int4(torch.randint(-8, 8, (experts, hidden, width), dtype=torch.int8))
    scales = torch.rand(experts, inner, groups) + 0.1, torch.rand(experts, hidden, 1) + 0.1
    bits = 4 if int4 else 8
    sizes = tokens, hidden, experts, width, hidden, gated, ACTIVATIONS.index(activation)
    (y,) = emulator.run(
        "w4a4_sparse_moe",
        *(x, scores, kept, gate_up, scales[0], down, scales[1], Out(x.shape, dtype)),
        *(KINDS[dtype], 0, *sizes, 0, groups, 1, bits, bits),
        seed=tokens,
    )
    expected = moe.w4a4_sparse_moe_reference(
        *(x, scores, kept, gate_up, scales[0], down, scales[1], gated, activation, bits)
    )
    assert torch.equal(y, expected)
