"""The Triton kernels, run by Triton's interpreter in a process of its own: "exact" for a case."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from torch_plugins.ops.int4 import pack_int4, w4a4_linear_reference

assert "triton" not in sys.modules, "imported before the first call needs it"

from torch_plugins.ops.triton.int4 import w4a4_linear

# Rows, features, outputs, groups; bits; static scale, zero point, bias; the dtype.
CASES = [
    ((3, 256, 70, 1), 4, (False, False, False), torch.float32),
    ((1, 75, 5, 3), 8, (True, True, True), torch.bfloat16),
    ((70, 96, 66, 3), 4, (False, False, True), torch.float16),
    ((2, 7, 1, 7), 2, (True, True, False), torch.float32),
    ((17, 2100, 9, 1), 4, (False, False, False), torch.bfloat16),
    ((2, 130, 3, 2), 4, (True, False, True), torch.float64),
]


def cut_to_bf16(x):
    """As the interpreter converts; GPUs round to the nearest, as torch does."""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def main():
    for seed, ((rows, features, outputs, groups), bits, options, dtype) in enumerate(CASES):
        torch.manual_seed(seed)
        static, shifted, biased = options
        x = (torch.randn(rows, features) * 3).to(dtype)
        if seed == 2:
            x[5, 7], x[6] = torch.nan, 0
        if seed == 5:
            x[1, 3], x[0, 4] = torch.nan, torch.inf
        arguments = (
            x,
            pack_int4(torch.randint(-8, 8, (outputs, features), dtype=torch.int8)),
            (torch.rand(outputs, groups) + 0.1).to(dtype),
            torch.tensor([0.37]) if static else None,
            torch.tensor([1.3]) if shifted else None,
            torch.randn(outputs).to(dtype) if biased else None,
            bits,
        )
        found, expected = w4a4_linear(*arguments), w4a4_linear_reference(*arguments)
        if dtype == torch.bfloat16:
            wide = w4a4_linear_reference(x.float(), *arguments[1:])
            assert torch.equal(wide.to(dtype), expected)
            expected = cut_to_bf16(wide)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        print("exact")
    for shape in ((0, 8), (3, 8)):
        empty = w4a4_linear(
            *(torch.ones(shape), torch.zeros(shape[0] and 0, 4, dtype=torch.uint8)),
            *(torch.ones(0, 1), None, None, None, 4),
        )
        assert empty.shape == (shape[0], 0)


if __name__ == "__main__":
    main()
