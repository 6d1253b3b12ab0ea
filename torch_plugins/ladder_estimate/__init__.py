"""What a ladder would gain on a cluster, before anything is trained: ``python -m
torch_plugins.ladder_residual estimate`` and ``check``.

Per tensor-parallel rank, module ``i`` (attention and MLP in turn) computes for ``a_i`` seconds and
its all-reduce takes ``c_i``. Of a decoder of ``n`` modules,

    standard            sum(a_i + c_i)
    ladder              a_1 + sum over i > 1 of (max(a_i, c_{i-1}) + ov min(a_i, c_{i-1})) + c_n
    no communication    sum(a_i)

where ``ov`` is the contention: the share of the shorter of two kernels that run side by side which
is not hidden after all. Equal modules and ``ov = 0`` give ``n (a + c)`` and
``a + (n - 1) max(a, c) + c``.

``a_i`` comes from a roofline (``roofline.py``), ``c_i`` from latency and bandwidth
(``collective.py``), the constants from data sheets (``hardware.py``), and what no data sheet tells
from a fit that names its data (``constants.py``). Better: measure ``sum(a_i)`` and
``sum(a_i + c_i)``; the formula then needs ``ov`` alone. ``check`` compares both forms with what the
paper's authors measured (``paper.py``).

Inference alone, dense decoders alone: a training step has recomputation, a data-parallel reduction
and a pipeline besides, for which no measurement of the paper could hold an estimate to account.

Standard library only. Paper: arXiv 2501.06589.
"""
