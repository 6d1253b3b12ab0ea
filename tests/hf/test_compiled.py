"""The pass that has a wait depend on the matrix product before it.

What the inductor makes of a whole decoder with it takes a minute of compiling: see the module.
"""

import torch
from torch._inductor.fx_passes.control_dependencies import control_deps

from torch_plugins.hf.compiled import HoldWaits


def traced():
    """``wait(all_reduce(x w)) + x w w`` with the wait behind the second product, as torch's passes
    leave a ladder, and a wait before any product, as the embedding's is."""
    graph = torch.fx.Graph()
    collective = torch.ops._c10d_functional
    x, w = graph.placeholder("x"), graph.placeholder("w")
    embedded = graph.call_function(collective.all_reduce.default, (x, "sum", "0"))
    x = graph.call_function(collective.wait_tensor.default, (embedded,))
    first = graph.call_function(torch.ops.aten.mm.default, (x, w))
    reduced = graph.call_function(collective.all_reduce.default, (first, "sum", "0"))
    second = graph.call_function(torch.ops.aten.addmm.default, (x, first, w))
    waited = graph.call_function(collective.wait_tensor.default, (reduced,))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (waited, second)))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(3, 3)
    return torch.fx.GraphModule(torch.nn.Module(), graph), second, reduced


def test_a_wait_depends_on_the_product_before_it():
    module, second, reduced = traced()
    count = len(module.graph.nodes)
    HoldWaits()(module.graph)
    module.graph.lint()
    held = [node for node in module.graph.nodes if node.target is control_deps]
    assert [node.args[0] for node in held] == [(second,)]
    assert held[0].args[2:] == (reduced,)
    assert len(module.graph.nodes) == count + 1  # the operation itself, as a subgraph
    (added,) = held[0].users
    assert added.target is torch.ops.aten.add.Tensor


def test_a_graph_without_products_stays():
    module, *_ = traced()
    for node in reversed(module.graph.nodes):
        if node.name.startswith(("mm", "addmm")):
            node.target = torch.ops.aten.matmul.default
    before = [node.target for node in module.graph.nodes]
    HoldWaits()(module.graph)
    assert [node.target for node in module.graph.nodes] == before


def test_the_inductors_cache_knows_the_pass():
    assert HoldWaits().uuid() == HoldWaits().uuid() != ""
