"""A pass of the inductor that keeps a ladder's all-reduces hidden in compiled decoders.

torch traces a functional collective with its wait right behind it, and the inductor moves the wait
to where its result is read: behind the matrix products of the next module of a ladder. Its
scheduler then fuses the sum that reads the result with the norm that the next module reads, as both
read the same stream, and so waits before that module again: of a ladder's two all-reduces a layer
only the MLP's stays hidden. This pass has a wait depend on the last matrix product before it::

    torch.compile(model, dynamic=False, options={"post_grad_custom_post_pass": HoldWaits()})
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch.utils._ordered_set import OrderedSet

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class HoldWaits(CustomGraphPass):
    """Waits stay behind the matrix products that precede them in the graph."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        product: torch.fx.Node | None = None
        behind: dict[torch.fx.Node, OrderedSet[torch.fx.Node]] = {}
        for node in graph.nodes:
            if node.target in PRODUCTS:
                product = node
            elif node.target is torch.ops._c10d_functional.wait_tensor.default and product:
                behind[node] = OrderedSet([product])
        preserve_node_ordering(graph, behind)

    def uuid(self) -> str:
        """Part of the key under which the inductor caches what it compiled."""
        return f"{__name__}.{type(self).__qualname__} 1"
