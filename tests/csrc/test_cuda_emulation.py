"""The kernels of ``csrc/cuda``, run by the emulator, against the references in Python.

Verified by emulation, not on a GPU: see ``cuda_emulator/emulator.h`` for what that cannot show.
"""

import random

import pytest
import torch

from tests.csrc.cuda_emulation import KINDS, Crash, Emulator, Out, build
from torch_plugins.ops.int4 import pack_int4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    emulator = Emulator(build("linear", tmp_path_factory.mktemp("linear")))
    yield emulator
    emulator.close()


def words(matrix, bits):
    """Neighbouring elements in int32, the first in the lowest bits."""
    if matrix.is_floating_point():
        return matrix.contiguous().view(torch.int32)
    each = 32 // bits
    parts = (matrix.long() & (2**bits - 1)).unflatten(-1, (-1, each))
    value = (parts << bits * torch.arange(each)).sum(-1)
    return (value - (value >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("kind", ["s4", "s8", "bf16", "f16"])
def test_the_emulated_product_is_that_of_matrices(linear, kind):
    """Fragments made from the manual's tables, word by word: no kernel is involved."""
    bits = int(kind.lstrip("sbf"))
    k = 256 // bits
    most = 2 ** min(bits - 1, 7)
    a, b = torch.randint(-most, most, (16, k)), torch.randint(-most, most, (k, 8))
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind, torch.int64)
    rows, columns = words(a.to(dtype), bits), words(b.T.to(dtype), bits)  # [16, 8], [8, 8]
    lane = torch.arange(32)
    group, within = lane // 4, lane % 4
    left = [rows[group, within], rows[group + 8, within]]
    left += [rows[group, within + 4], rows[group + 8, within + 4]]
    right = [columns[group, within], columns[group, within + 4]]
    out = Out((32, 4), torch.float32 if bits == 16 else torch.int32)
    (d,) = linear.run(f"mma {kind}", torch.stack(left, -1), torch.stack(right, -1), out)
    product = a @ b
    for i in range(4):
        found = product[group + i // 2 * 8, within * 2 + i % 2]
        assert torch.equal(d[:, i].long(), found)


def w4a4_case(rows, features, outputs, groups, dtype, static=False, zero=False, bias=False):
    x = torch.randn(rows, features) * 3
    weight = pack_int4(torch.randint(-8, 8, (outputs, features), dtype=torch.int8))
    weight[:, -1] |= (features % 2) * 0xF0  # what belongs to nothing
    scale = torch.rand(outputs, groups) + 0.1
    return (
        x.to(dtype),
        weight,
        scale.to(dtype),
        torch.tensor([0.37], dtype=dtype) if static else None,
        torch.tensor([1.3], dtype=dtype) if zero else None,
        torch.randn(outputs).to(dtype) if bias else None,
    )


def emulated(linear, case, bits, int4, seed, offset=0):
    x, weight, scale, *_, bias = case
    if offset:
        weight = torch.cat((weight.new_full((offset,), 77), weight.flatten()))
    kinds = KINDS[x.dtype], KINDS[scale.dtype], KINDS[scale.dtype if bias is None else bias.dtype]
    sizes = *x.shape, *scale.shape, bits, 4 if int4 else 8, offset
    out = Out((x.shape[0], scale.shape[0]), x.dtype)
    (y,) = linear.run("w4a4_linear", x, weight, *case[2:], out, *kinds, *sizes, seed=seed)
    return y


# rows, features, outputs, groups: whole tiles, ragged ones, odd groups, one of everything.
SHAPES = [
    (16, 256, 64, 1),
    (1, 128, 70, 4),
    (3, 75, 5, 1),
    (65, 96, 66, 3),
    (17, 45, 9, 5),
    (2, 7, 1, 7),
    (1, 1, 1, 1),
    (70, 300, 130, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("int4", [True, False])
def test_w4a4_linear_is_exact(linear, shape, int4):
    seeds = range(4) if shape[0] * shape[1] < 5000 else (2, 3)
    for seed in seeds:
        torch.manual_seed(seed)
        dtype = DTYPES[seed % 3]
        bits = (4, 3, 4, 2)[seed] if int4 else (4, 8, 5, 2)[seed]
        case = w4a4_case(*shape, dtype, static=seed % 2, zero=seed // 2, bias=seed != 1)
        reference = torch.ops.torch_plugins.w4a4_linear(*case, bits)
        found = emulated(linear, case, bits, int4, seed, offset=(0, 1, 0, 16)[seed])
        assert torch.equal(found, reference), (seed, dtype)


@pytest.mark.parametrize("int4", [True, False])
def test_any_shape(linear, int4):
    draw = random.Random(int4)
    for seed in range(25):
        torch.manual_seed(seed)
        groups = draw.randint(1, 4)
        features = groups * draw.choice((draw.randint(1, 70), 32, 64))
        shape = draw.randint(1, 20), features, draw.randint(1, 40), groups
        options = [draw.random() < 0.5 for _ in range(3)]
        case = w4a4_case(*shape, draw.choice(DTYPES), *options)
        reference = torch.ops.torch_plugins.w4a4_linear(*case, 4)
        found = emulated(linear, case, 4, int4, seed, offset=draw.choice((0, 1, 8, 16)))
        assert torch.equal(found, reference), (shape, options)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("int4", [True, False])
def test_what_is_no_number(linear, static, int4):
    case = w4a4_case(5, 40, 3, 2, torch.float32, static)
    x = case[0]
    x[0, 1], x[1, 39], x[2], x[3, 5] = torch.nan, torch.inf, 0, 3e38
    found = emulated(linear, case, 4, int4, 0)
    expected = torch.ops.torch_plugins.w4a4_linear(*case, 4)
    assert found[0].isnan().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


BROKEN = {
    "no barrier behind the tiles": (
        "linear.cuh",
        "next.put(a, b);\n      __syncthreads();",
        "next.put(a, b);",
    ),
    "no barrier before the tiles": (
        "linear.cuh",
        "__syncthreads();  // the tiles before have been read",
        "",
    ),
    "no barrier behind a maximum": (
        "numbers.cuh",
        "join(value, memory[warp]);\n  __syncthreads();",
        "join(value, memory[warp]);",
    ),
    "one row too many": ("linear.cuh", "if (m >= count ||", "if (m > count ||"),
    "a tile longer than its memory": (
        "linear.cuh",
        "SHARED(uint8_t, b, (Block::COLUMNS * TILE_STRIDE));",
        "SHARED(uint8_t, b, (Block::COLUMNS * TILE_STRIDE - 17));",
    ),
    "no mask behind a group": ("tiles.cuh", "k + i < end; ++i) {", "k + i < end + 8; ++i) {"),
    "another layout of fragments": (
        "linear.cuh",
        "r + i % 2 * 8, step + c + i / 2 * 16",
        "r + i / 2 * 8, step + c + i % 2 * 16",
    ),
}
BEYOND_MEMORY = {"one row too many", "a tile longer than its memory"}


def what_is_seen(emulator, seed):
    """What is wrong with the program, or None."""
    torch.manual_seed(seed)
    case = w4a4_case(18, 75 * 4, 66, 4, torch.float32)
    try:
        y = emulated(emulator, case, 4, True, seed)
    except Crash as crash:
        return "beyond memory" if "heap-buffer-overflow" in str(crash) else str(crash)
    right = torch.equal(y, torch.ops.torch_plugins.w4a4_linear(*case, 4))
    return None if right else "another result"


@pytest.mark.parametrize("what", BROKEN)
def test_the_emulator_sees_what_is_broken(tmp_path, what):
    """A missing barrier within eight seeds, anything else with the first."""
    program = build("linear", tmp_path, [BROKEN[what]], ["-fno-sanitize=undefined"])
    emulator = Emulator(program)
    seeds = range(8 if "barrier" in what else 1)
    seen = next(filter(None, (what_is_seen(emulator, seed) for seed in seeds)), None)
    emulator.close()
    assert seen in ("beyond memory", "another result")
    if what in BEYOND_MEMORY:
        assert seen == "beyond memory"
