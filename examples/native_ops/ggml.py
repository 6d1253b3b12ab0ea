"""The few functions of ggml that one matrix product needs, through ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

F32, Q4_0, BLOCK, BLOCK_BYTES = 0, 2, 32, 18
GRAPH_BYTES = 2**20
PLAIN = "CPU"
SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_version": (c_char_p, []),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buft_get_alloc_size": (c_size_t, [c_void_p] * 2),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p] * 3),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_free": (None, [c_void_p]),
    "ggml_log_set": (None, [c_void_p] * 2),
}

SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class Parameters(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class Library:
    """The functions of ``SIGNATURES``, of three libraries that need one another in this order."""

    def __getattr__(self, name: str) -> Any:
        """Functions are attributes by their names, set below."""
        raise AttributeError(name)

    def __init__(self, folder: Path) -> None:
        opened = [
            ctypes.CDLL(str(next(folder.glob(f"lib{name}.*"))), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
        for name, (result, arguments) in SIGNATURES.items():
            function = next(getattr(of, name) for of in opened if hasattr(of, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.init = opened[0].ggml_init
        self.init.restype, self.init.argtypes = c_void_p, [Parameters]
        self.ggml_log_set(SILENT, None)
        self.backend = self.ggml_backend_cpu_init()
        self.buffers = {PLAIN: self.ggml_backend_cpu_buffer_type()}
        registry = self.ggml_backend_dev_backend_reg(self.ggml_backend_get_device(self.backend))
        more = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if more:
            listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(more)
            for pointer in listed(self.ggml_backend_get_device(self.backend)):
                if not pointer:
                    break
                self.buffers[self.ggml_backend_buft_name(pointer).decode()] = pointer

    def context(self) -> int:
        return self.init(Parameters(GRAPH_BYTES, None, True))

    def place(self, tensor: int, kind: str) -> int:
        """Memory of a kind for a tensor; the buffer, to be freed."""
        size = self.ggml_backend_buft_get_alloc_size(self.buffers[kind], tensor)
        buffer = self.ggml_backend_buft_alloc_buffer(self.buffers[kind], size)
        self.ggml_backend_tensor_alloc(buffer, tensor, self.ggml_backend_buffer_get_base(buffer))
        return buffer
