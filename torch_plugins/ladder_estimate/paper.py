"""What the paper's authors measured on H100: prompts of 1024 tokens, 512 generated.

Sources, all of the authors' repository mayank31398/ladder-residual-inference: tokens/s of 70B,
figures of arXiv 2501.06589 drawn by tools/plot-70b.py; ratios of 405B over two nodes,
tools/plot-405b.py; tokens/s of 8B, the result logs ``final-results-512`` of commit cba87d4, which
the paper does not tabulate. "No P2P" is NCCL_P2P_DISABLE=1: data goes through host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import MODELS, Shape


@dataclass(frozen=True)
class Cell:
    """One configuration, in tokens/s or relative to the standard model."""

    table: str
    shape: Shape
    link: str
    nodes: int
    tp: int
    batch: int
    standard: float
    ladder: float
    parallel: float
    bound: float
    """Without communication."""


SIZE_405B = Shape(126, 16384, 53248, 128, 16, 128, 128256)
"""As benchmarked: with 16 KV heads, not the release's 8."""

# tp: batch, standard, ladder, parallel, bound, then standard, ladder, parallel without P2P
_70B = {
    2: (
        (1, 35.42, 36.69, 36.67, 38.24, 33.77, 36.94, 36.12),
        (4, 120.58, 126.09, 123.66, 130.77, 106.6, 125.55, 116.83),
    ),
    4: (
        (1, 59.41, 67.51, 65.4, 69.04, 53.35, 66.6, 61.93),
        (4, 185.01, 204.3, 201.62, 213.73, 158.77, 204.24, 183.53),
        (16, 585.23, 635.98, 628.23, 665.07, 518.41, 598.71, 583.48),
        (64, 1249.67, 1358.65, 1311.54, 1433.53, 1199.62, 1313.44, 1276.66),
    ),
    8: (
        (1, 77.39, 101.22, 94.22, 110.59, 51.66, 82.59, 72.36),
        (4, 258.56, 331.45, 307.34, 355.8, 173.62, 271.82, 241.08),
        (16, 843.15, 1003.52, 973.74, 1109.65, 546.68, 738.56, 744.33),
        (64, 1940.99, 2242.1, 2259.38, 2474.49, 1454.42, 1864.05, 1873.71),
    ),
}

# batch: ladder, parallel, bound relative to standard; then the same without P2P
_405B = (
    (1, 1.364019677, 1.237526353, 1.52073085, 1.489855072, 1.396618357, 2.106763285),
    (4, 1.307557841, 1.242467866, 1.511876607, 1.565769112, 1.439028165, 2.274682761),
    (8, 1.393313367, 1.285679359, 1.658883931, 1.434301985, 1.415040616, 2.270580353),
    (16, 1.349331588, 1.272326351, 1.631580761, 1.461046963, 1.398749487, 2.15964584),
)

# tp: batch, standard, ladder, parallel, bound
_8B = {
    2: (
        (1, 223.28, 251.94, 250.83, 261.48),
        (4, 666.73, 719.81, 717.66, 790.51),
        (16, 2024.89, 2188.42, 2152.68, 2315.41),
        (64, 4060.03, 4257.75, 4291.16, 4478.93),
    ),
    4: (
        (1, 264.32, 329.98, 325.88, 363.96),
        (4, 863.68, 1071.69, 1042.63, 1169.29),
        (16, 2732.49, 3230.18, 3210.62, 3484.12),
        (64, 6277.04, 6850.47, 7033.07, 7497.33),
    ),
    8: (
        (1, 278.63, 395.71, 371.29, 471.34),
        (4, 902.02, 1301.53, 1187.59, 1453.31),
        (16, 3097.47, 4242.27, 4013.17, 4671.53),
        (64, 8573.7, 10566.79, 10370.73, 11725.08),
    ),
}


def _cells_70b() -> list[Cell]:
    shape = MODELS["llama-3.1-70b"]
    with_p2p, without = [], []
    for tp, rows in _70B.items():
        for batch, standard, ladder, parallel, bound, *slow in rows:
            times = standard, ladder, parallel, bound
            with_p2p.append(Cell("70B", shape, "nvlink", 1, tp, batch, *times))
            standard, ladder, parallel = slow  # the bound sends nothing, so it is the same
            times = standard, ladder, parallel, bound
            without.append(Cell("70B no P2P", shape, "pcie", 1, tp, batch, *times))
    return with_p2p + without


def _cells_405b() -> list[Cell]:
    with_p2p, without = [], []
    for batch, ladder, parallel, bound, *slow in _405B:
        ratios = 1.0, ladder, parallel, bound
        with_p2p.append(Cell("405B", SIZE_405B, "nvlink", 2, 16, batch, *ratios))
        ladder, parallel, bound = slow
        ratios = 1.0, ladder, parallel, bound
        without.append(Cell("405B no P2P", SIZE_405B, "pcie", 2, 16, batch, *ratios))
    return with_p2p + without


def _cells_8b() -> list[Cell]:
    shape = MODELS["llama-3.1-8b"]
    return [Cell("8B", shape, "nvlink", 1, tp, *row) for tp, rows in _8B.items() for row in rows]


FITTED_ON = ("70B", "70B no P2P")
"""Tables that the constants of ``constants.FITTED`` were fitted on."""

CELLS = (*_cells_70b(), *_cells_8b(), *_cells_405b())
"""20 of 70B, 12 of 8B, 8 of 405B."""
