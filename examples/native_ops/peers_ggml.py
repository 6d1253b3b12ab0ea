"""Q4_0 of ggml: int4 weights in blocks of 32, inputs quantized to int8 in the same blocks.

The libraries are those that ``make bench-csrc`` compiles, or llama-cpp-python's where that is
installed. Weights lie in the buffer that ggml itself would choose for this processor (AMX, or rows
interleaved for its vectors); each is tried in a process of its own first, as code that was compiled
for a processor may still crash on it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from arms import Unavailable, relative_error
from ggml import BLOCK, BLOCK_BYTES, F32, PLAIN, Q4_0, Library
from names import GGML
from peers import Forward, Peer
from torch import Tensor
from weights import Weight, remembering

BUILT = Path("ggml/build/bin")
"""Below the environment that ``make bench-csrc`` makes."""


@cache
def library() -> Library:
    """Raises Unavailable where it is not there."""
    spec = importlib.util.find_spec("llama_cpp")
    places = [Path(sys.prefix, BUILT)]
    places += [Path(spec.origin).parent / "lib"] if spec and spec.origin else []
    for place in places:
        if list(place.glob("libggml-base.*")):
            return Library(place)
    raise Unavailable("not built: make bench-csrc compiles it, with cmake")


@cache
def kind() -> str:
    """The buffer that weights lie in: the first of ggml's own that works."""
    special = [name for name in library().buffers if name != PLAIN]
    for name in (*special, PLAIN):
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            return name
        print(f"ggml: weights in its buffer {name}: failed with {done.returncode}", flush=True)
    raise Unavailable("no product of it is right")


class Linear:
    """``y = x W^T`` by one graph for each number of rows; the output lives as long as this."""

    def __init__(self, weight: Weight, threads: int, buffer: str) -> None:
        self.ggml, self.threads, self.weight = library(), threads, weight
        self.contexts = [self.ggml.context()]
        self.matrix = self.ggml.ggml_new_tensor_2d(self.contexts[0], Q4_0, weight.k, weight.n)
        self.buffers = [self.ggml.place(self.matrix, buffer)]
        blocks = quantized(weight)
        self.ggml.ggml_backend_tensor_set(self.matrix, blocks.data_ptr(), 0, blocks.numel())
        self.graphs: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.fill = remembering(lambda x: self.graph(x.shape[0])[1].copy_(x))

    def graph(self, rows: int) -> tuple[int, Tensor, Tensor]:
        """Graph, input and output: tensors over the memory that it reads and writes."""
        if rows not in self.graphs:
            ggml, context = self.ggml, self.ggml.context()
            self.contexts.append(context)
            x = ggml.ggml_new_tensor_2d(context, F32, self.weight.k, rows)
            y = ggml.ggml_mul_mat(context, self.matrix, x)
            self.buffers += [ggml.place(tensor, PLAIN) for tensor in (x, y)]
            graph = ggml.ggml_new_graph(context)
            ggml.ggml_build_forward_expand(graph, y)
            inputs = _over(ggml.ggml_get_data(x), rows, self.weight.k)
            outputs = _over(ggml.ggml_get_data(y), rows, self.weight.n)
            self.graphs[rows] = graph, inputs, outputs
        return self.graphs[rows]

    def __call__(self, x: Tensor) -> Tensor:
        self.fill(x)
        graph, _, out = self.graph(x.shape[0])
        self.ggml.ggml_backend_cpu_set_n_threads(self.ggml.backend, self.threads)
        if self.ggml.ggml_backend_graph_compute(self.ggml.backend, graph):
            raise RuntimeError("ggml failed")
        return out

    def __del__(self) -> None:
        for buffer in self.buffers:
            self.ggml.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.ggml_free(context)


def quantized(weight: Weight) -> Tensor:
    """The blocks of ggml's own quantizer, made once."""
    if "q4_0" not in weight.__dict__:
        if weight.k % BLOCK:
            raise Unavailable(f"{weight.k} input features are no blocks of {BLOCK}")
        blocks = torch.empty(weight.fp32.numel() // BLOCK * BLOCK_BYTES, dtype=torch.uint8)
        source, target = weight.fp32.data_ptr(), blocks.data_ptr()
        library().ggml_quantize_chunk(Q4_0, source, target, 0, weight.n, weight.k, None)
        weight.__dict__["q4_0"] = blocks
    found: Tensor = weight.__dict__["q4_0"]
    return found


def _over(address: int, *shape: int) -> Tensor:
    size = shape[0] * shape[1]
    values = (ctypes.c_float * size).from_address(address)
    return torch.frombuffer(values, dtype=torch.float32).view(shape)


def prepare(weight: Weight, threads: int) -> Forward:
    return Linear(weight, threads, kind())


PEER = Peer(GGML, "W4A8 g32", 8 * BLOCK_BYTES / BLOCK, prepare)

if __name__ == "__main__":
    small = Weight(512, 128)
    for tokens in (1, 7, 40):
        rows = torch.randn(tokens, small.k)
        linear = Linear(small, 1, sys.argv[1])
        if relative_error(linear(rows), rows @ small.fp32.T) > 0.2:
            sys.exit("wrong")
