"""What data sheets do not tell: either assumed perfect, or fitted, on data that is named."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LinkConstants:
    """How a link falls short of its data sheet."""

    share: float = 1.0
    """Of the bandwidth that a large all-reduce reaches."""
    start: float = 0.0
    """Seconds that every all-reduce takes beyond NCCL's own figure."""
    step: float = 1.0
    """Factor on NCCL's figure of one step within a node."""


@dataclass(frozen=True)
class Constants:
    matmul: float = 1.0
    """Share of the peak FLOP/s that matrix products reach."""
    memory: float = 1.0
    """Share of the memory bandwidth reached."""
    module: float = 0.0
    """Seconds of a module, whatever its size: starts and ends of its kernels."""
    contention: float = 0.0
    """``ov``: share of the shorter of two overlapped kernels that is not hidden."""
    links: dict[str, LinkConstants] = field(default_factory=dict)
    """By kind; a link that is missing is taken at its word."""

    def of_link(self, kind: str) -> LinkConstants:
        return self.links.get(kind, LinkConstants())


DATA_SHEET = Constants()
"""Nothing fitted: every peak is reached, kernels start at once, and all overlap is free."""

FITTED = Constants(
    matmul=0.61,
    memory=0.9,
    module=20e-6,
    contention=0.31,
    links={
        "nvlink": LinkConstants(share=0.51, start=3.7e-6, step=1.6),
        "pcie": LinkConstants(share=0.99, start=3.2e-6, step=3.7),
    },
)
"""Ten constants, fitted by ``fit.py`` on the paper's tables of 70B on H100: 20 configurations,
tensor parallel 2 to 8, with NVLink and through host memory. InfiniBand: NCCL's figures, unfitted.
"""
