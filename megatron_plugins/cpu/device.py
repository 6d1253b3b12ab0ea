"""The CUDA device is the CPU: availability, queries, and every way to name a device."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_plugins.cpu.piece import Piece, replace

CPU = torch.device("cpu")

FACTORIES = (
    "arange asarray as_tensor empty empty_like empty_strided eye full full_like linspace logspace "
    "ones ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor "
    "tensor tril_indices triu_indices zeros zeros_like"
)
TENSOR_FACTORIES = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"
LEGACY_TYPES = (
    "BFloat16Tensor BoolTensor ByteTensor CharTensor DoubleTensor FloatTensor HalfTensor "
    "IntTensor LongTensor ShortTensor"
)
ZERO = (
    "memory_allocated memory_reserved max_memory_allocated max_memory_reserved "
    "device_memory_used utilization power_draw temperature clock_rate"
)
NOTHING = "empty_cache ipc_collect reset_peak_memory_stats reset_max_memory_allocated"


def on_cpu(device: Any) -> Any:
    """The CPU for anything that names a CUDA device (``"cuda"``, ``"cuda:0"``, an index)."""
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    if isinstance(device, (str, torch.device)) and str(device).startswith("cuda"):
        return CPU
    return device


def redirect_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory: ``device=`` means the CPU, ``pin_memory=`` is dropped."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _properties(device: Any = None) -> SimpleNamespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=memory, multi_processor_count=os.cpu_count()
    )


def _availability() -> None:
    cuda = torch.cuda
    # Compute capability 8.0: the lowest that upstream's checks accept for bf16 and grouped GEMM.
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "current_device": lambda: CPU,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "cpu",
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": _properties,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name, answer in answers.items():
        replace(cuda, name, answer)
    # torch's own device-neutral code (optimizers, data loaders) keeps the truth: no accelerator.
    if accelerator := getattr(torch, "accelerator", None):  # torch 2.6
        replace(accelerator, "is_available", lambda: False)
        replace(accelerator, "current_accelerator", lambda check_available=False: None)


def _memory() -> None:
    cuda = torch.cuda
    for name in ZERO.split():
        replace(cuda, name, lambda device=None: 0)
    for name in NOTHING.split():
        replace(cuda, name, lambda device=None: None)
    replace(cuda, "memory_stats", lambda device=None: defaultdict(int))
    replace(cuda, "memory_snapshot", list)
    total = _properties().total_memory
    replace(cuda, "mem_get_info", lambda device=None: (total, total))
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        replace(cuda.nvtx, name, lambda *args, **kwargs: 0)
    replace(cuda.nvtx, "range", lambda *args, **kwargs: contextlib.nullcontext())


def _device_arguments() -> None:
    for name in FACTORIES.split():
        replace(torch, name, redirect_device(getattr(torch, name)))
    for name in TENSOR_FACTORIES.split():
        replace(torch.Tensor, name, redirect_device(getattr(torch.Tensor, name)))
    for name in LEGACY_TYPES.split():
        replace(torch.cuda, name, getattr(torch, name))

    tensor_to, load, loader_init = torch.Tensor.to, torch.load, torch.utils.data.DataLoader.__init__

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    @functools.wraps(load)
    def load_on_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(f, on_cpu(map_location), *args, **kwargs)

    @functools.wraps(loader_init)
    def init_loader(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        if kwargs.get("generator") is None:
            # The default generator is dropout's here; a loader draws its workers' seed from one.
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        loader_init(self, *args, **kwargs)

    replace(torch.Tensor, "to", to)
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    replace(torch, "load", load_on_cpu)
    replace(torch.utils.data.DataLoader, "__init__", init_loader)


def _type_strings() -> None:
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    replace(torch.Tensor, "type", type_)


PIECES = (
    Piece(
        "availability",
        "the training loop asserts that CUDA is available and asks the device for its properties; "
        "the current device is the CPU",
        "everything",
        _availability,
    ),
    Piece(
        "device-arguments",
        'device="cuda", "cuda:0" or an index, .cuda(), legacy CUDA tensor types, map_location and '
        "pinned memory mean the CPU",
        "everything",
        _device_arguments,
    ),
    Piece(
        "type-strings",
        "optimizers and gradient clipping compare Tensor.type() with torch.cuda.FloatTensor",
        "optimizers",
        _type_strings,
    ),
    Piece("memory", "memory statistics are zeros, nvtx ranges do nothing", "logging", _memory),
)
