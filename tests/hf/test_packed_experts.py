"""DS-MoE's experts in four bits: pack_experts on the decoder."""

import copy

import pytest
import torch

from torch_plugins.config import ConfigError
from torch_plugins.dense_moe_int4 import PackedExperts, pack_experts
from torch_plugins.hf.experts import PluginDecoderDenseMoE
from torch_plugins.ops.int4 import pack_int4
from torch_plugins.ops.sparse_moe import w4a4_sparse_moe_reference
from torch_plugins.weight_quant import round_to_nearest

GATED = {"dense_moe": {"num_experts": 5, "gated": True, "inference": "top-k", "top_k": 2}}
GELU = {
    "dense_moe": {"num_experts": 4, "gated": False, "inference": "threshold", "threshold": 0.6},
    "mlp_gated": False,
    "hidden_act": "gelu",
}


def rounded(weight, experts, by_columns, group_size):
    """What four bits leave of a matrix, expert by expert."""
    parts = weight.unflatten(int(by_columns), (experts, -1)).unbind(int(by_columns))
    whole = [round_to_nearest(part, 4, group_size).dequantize() for part in parts]
    return torch.cat(whole, int(by_columns))


@pytest.mark.parametrize("group_size", [-1, 2])
@pytest.mark.parametrize("shape", [GATED, GELU], ids=["swiglu", "gelu"])
def test_a_packed_model_is_the_model_of_rounded_weights(make_model, tokens, shape, group_size):
    """Up to what eight bits take from inputs, much less than what four take from weights."""
    model, ids = make_model(torch.float32, **shape), tokens(2, 9)
    other = copy.deepcopy(model)
    for layer in other.modules():
        if isinstance(layer, PluginDecoderDenseMoE):
            experts = layer.router.weight.shape[0]
            for name in ("gate_proj", "up_proj", "down_proj"):
                if hasattr(layer, name):
                    weight = getattr(layer, name).weight
                    weight.data = rounded(weight.data, experts, name == "down_proj", group_size)
    with torch.no_grad():
        plain = model(ids).logits
        assert pack_experts(model, 8, group_size) == len(model.model.layers)
        packed, expected = model(ids).logits, other(ids).logits
        error = (packed - expected).norm() / (expected - plain).norm()
        assert 0 < error < 0.2
        pack_experts(model, 4, group_size)
        assert (model(ids).logits - expected).norm() > 2 * (packed - expected).norm()
    # With gradients, in training, and with all experts: the weights themselves.
    assert torch.equal(model(ids).logits.detach(), plain)
    with torch.no_grad():
        model.set_experts(inference="dense")
        other = copy.deepcopy(model).train()
        assert torch.allclose(model(ids).logits, other(ids).logits, atol=1e-6)


def test_layers_equal_the_definition():
    """With relu bit for bit, from the codes that rounding to nearest gives."""
    torch.manual_seed(0)
    N, D, width = 3, 16, 10
    gate, up, down = torch.randn(N * width, D), torch.randn(N * width, D), torch.randn(D, N * width)
    layer = PackedExperts((gate, up), down, N, torch.nn.functional.relu, 8)
    x, scores, kept = torch.randn(7, D), torch.rand(7, N), torch.rand(7, N) < 0.5

    def packed(parts):
        quantized = [round_to_nearest(part) for part in parts]
        codes = torch.stack([pack_int4(q.codes_OI) for q in quantized])
        return codes, torch.stack([q.scales_OG for q in quantized])

    into = [torch.cat(pair) for pair in zip(gate.split(width), up.split(width), strict=True)]
    weights = (*packed(into), *packed(down.split(width, 1)))
    expected = w4a4_sparse_moe_reference(x, scores, kept, *weights, True, "relu", 8)
    torch.testing.assert_close(layer(x, scores, kept), expected, rtol=0, atol=0)


def test_it_says_what_it_cannot(make_model, tokens):
    model, ids = make_model(torch.float32, **GATED), tokens(1, 4)
    with pytest.raises(ConfigError, match="input_bits 9: must be between 2 and 8"):
        pack_experts(model, 9)
    with pytest.raises(ConfigError, match="group"):
        pack_experts(model, 8, 7)
    with pytest.raises(ConfigError, match="has no layer with the experts of DS-MoE"):
        pack_experts(make_model(torch.float32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack_experts(model)
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        model(ids)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="have changed since pack_experts: call it again"):
            model(ids)
        pack_experts(model)
        model(ids)
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(ConfigError, match=r"activation Tanh.*: experts in four bits have silu"):
        pack_experts(model)
