"""Constants of data sheets, each with its source; nothing here is fitted.

Rates are peaks of dense bf16 without sparsity; bandwidths are one direction's, where data sheets
print the sum of both. Rates, memory and NVLink were compared with public listings of the data
sheets, not with the sheets; network adapters were not compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..feature import ConfigError


@dataclass(frozen=True)
class GPU:
    flops: float
    """Dense bf16, FLOP/s."""
    memory: float
    """Bytes/s of HBM or GDDR."""
    capacity: float
    """Bytes of memory."""
    nvlink: float
    """Bytes/s, one direction, all links together; 0 without NVLink."""
    pcie: float
    """Bytes/s, one direction, 16 lanes."""
    network: float
    """Bytes/s of the network adapter beside each GPU in NVIDIA's reference server."""
    source: str


GPUS = {
    "a100": GPU(
        312e12, 2.039e12, 80e9, 300e9, 32e9, 25e9,
        "A100 80GB SXM data sheet (NVLink 600 GB/s both ways, PCIe Gen4); DGX A100: HDR 200 Gb/s",
    ),
    "h100": GPU(
        989e12, 3.35e12, 80e9, 450e9, 64e9, 50e9,
        "H100 SXM data sheet (NVLink 900 GB/s both ways, PCIe Gen5); DGX H100: NDR 400 Gb/s",
    ),
    "h200": GPU(
        989e12, 4.8e12, 141e9, 450e9, 64e9, 50e9,
        "H200 SXM data sheet (NVLink 900 GB/s both ways, PCIe Gen5); DGX H200: NDR 400 Gb/s",
    ),
    "b200": GPU(
        2250e12, 8e12, 180e9, 900e9, 64e9, 50e9,
        "DGX B200 data sheet, an eighth (NVLink 1.8 TB/s both ways, PCIe Gen5, 400 Gb/s)",
    ),
    "l40s": GPU(
        362e12, 864e9, 48e9, 0.0, 32e9, 25e9,
        "L40S data sheet (no NVLink, PCIe Gen4); assumed: a 200 Gb/s adapter a GPU",
    ),
}  # fmt: skip

LINKS = ("nvlink", "pcie", "ib")


@dataclass(frozen=True)
class Link:
    """What joins two neighbours of a ring."""

    bandwidth: float
    """Bytes/s, one direction."""
    latency: float
    """Seconds of one step."""
    tree_latency: float
    """Seconds of one level of a tree."""


NCCL_START = 6.6e-6
"""Seconds before the first step of a ring all-reduce, protocol LL: ``baseLat`` of NCCL 2.20,
src/graph/tuning.cc."""

NCCL_STEP = {"nvlink": (0.6e-6, 0.6e-6), "pcie": (1.0e-6, 1.0e-6), "ib": (2.7e-6, 5.0e-6)}
"""Seconds of a ring's step and of a tree's, protocol LL: ``hwLat`` of the same file."""


def link(kind: str, gpu: GPU) -> Link:
    """The link of a kind beside a GPU.

    Raises:
        ConfigError: the GPU has no such link.
    """
    bandwidth = {"nvlink": gpu.nvlink, "pcie": gpu.pcie, "ib": gpu.network}[kind]
    if not bandwidth:
        raise ConfigError(f"--link {kind}: this GPU has none; use --link pcie")
    return Link(bandwidth, *NCCL_STEP[kind])
