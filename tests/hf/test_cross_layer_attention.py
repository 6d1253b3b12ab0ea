"""Cross-Layer Attention in the decoder: one function with the reference, whatever runs it."""

import pytest
import torch
from transformers import AttentionInterface

from torch_plugins import reference
from torch_plugins.hf import stock_config

CLA2 = {"sharing_factor": 2}
SHORT_FIRST = {"sharing_factor": 3, "kv_norm": "separate"}
LISTED = {"pattern": "0,1,1,3"}
SHAPES = {
    "gqa": {},
    "mha-learned-bias": {
        "normalization": "layernorm",
        "mlp_gated": False,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": None,
        "position_embedding_type": "learned_absolute",
        "tie_word_embeddings": True,
    },
    "mqa-qk-layernorm": {
        "num_key_value_heads": 1,
        "head_dim": 10,
        "normalization": "layernorm",
        "qk_norm": True,
    },
    "partial-rotary-qk-rmsnorm": {
        "head_dim": 12,
        "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "qk_norm": True,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
    },
}

ladders = pytest.mark.parametrize(
    "ladder", [None, {"layers": "all"}, {"layers": "last:2"}], ids=["dense", "ladder", "last:2"]
)
patterns = pytest.mark.parametrize(
    "cla", [CLA2, SHORT_FIRST, LISTED], ids=["cla2", "cla3-separate-norm", "listed"]
)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@patterns
@ladders
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_the_reference(make_model, tokens, shape, ladder, cla):
    model = make_model(torch.float64, **shape, ladder_residual=ladder, cross_layer_attention=cla)
    parameters, ids = dict(model.named_parameters()), tokens(2, 9)
    expected = reference.logits(parameters, model.config.to_diff_dict(), ids)
    got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view_as(got)
    want = torch.autograd.grad(expected, list(parameters.values()), upstream)
    have = torch.autograd.grad(got, list(parameters.values()), upstream)
    for name, a, b in zip(parameters, have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_consumers_have_no_key_and_value_parameters(make_model):
    model = make_model(cross_layer_attention=SHORT_FIRST, qk_norm=True, attention_bias=True)
    of_layer = [
        {
            n.split(f"layers.{i}.self_attn.")[1]
            for n in model.state_dict()
            if f"layers.{i}.self" in n
        }
        for i in range(4)
    ]
    consumer = {"q_proj.weight", "q_proj.bias", "o_proj.weight", "o_proj.bias", "q_norm.weight"}
    producer = consumer | {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}
    producer |= {"k_norm.weight", "kv_norm.weight"}
    assert of_layer == [producer, producer, consumer, consumer]
    assert len(list(model.parameters())) == len(model.state_dict())


@ladders
def test_factor_one_is_bitwise_the_baseline(make_model, tokens, ladder):
    plain = make_model(ladder_residual=ladder)
    one = make_model(ladder_residual=ladder, cross_layer_attention={"sharing_factor": 1})
    assert one.state_dict().keys() == plain.state_dict().keys()
    ids = tokens()
    assert torch.equal(one(ids).logits, plain(ids).logits)
    a, b = gradients(one, ids), gradients(plain, ids)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_what_no_stock_model_expresses(make_config):
    assert stock_config(make_config(cross_layer_attention={"sharing_factor": 1})) is not None
    separate = {"sharing_factor": 1, "kv_norm": "separate"}
    for fields in ({"cross_layer_attention": CLA2}, {"cross_layer_attention": separate}):
        assert stock_config(make_config(**fields)) is None
    assert stock_config(make_config(qk_norm=True)) is None


@patterns
@ladders
def test_gradient_of_keys_and_values_is_the_sum_over_the_group(make_model, tokens, ladder, cla):
    """Every layer attends through a copy, whose gradient is that layer's share."""
    model = make_model(torch.float64, ladder_residual=ladder, cross_layer_attention=cla)
    used = {}

    def attend(module, query, key, value, mask, scaling, **kwargs):
        copies = key.clone(), value.clone()
        for tensor in (key, value, *copies):
            tensor.retain_grad()
        used[module.layer_idx] = (key, value), copies
        out = torch.nn.functional.scaled_dot_product_attention(
            query, *copies, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("copies", attend)
    model.set_attn_implementation("copies")
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    producers = model.config.kv_producers
    for producer in set(producers):
        members = [layer for layer in range(4) if producers[layer] == producer]
        for which in (0, 1):
            shared = used[producer][0][which]
            assert all(used[layer][0][which] is shared for layer in members)
            shares = [used[layer][1][which].grad for layer in members]
            assert all(share.abs().max() > 1e-6 for share in shares)
            torch.testing.assert_close(shared.grad, sum(shares), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("use_reentrant", [True, False])
@patterns
@ladders
def test_gradient_checkpointing_is_exact(make_model, tokens, ladder, cla, use_reentrant):
    """To the bit, but that reentrant checkpointing adds up a ladder's streams in another order."""
    model = make_model(torch.float64, ladder_residual=ladder, cross_layer_attention=cla).train()
    plain = gradients(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = gradients(model, tokens())
    if ladder is None or not use_reentrant:
        assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-12, atol=1e-12)


def test_sdpa_eager_and_flex_are_equal(make_model, tokens):
    """Flex attention uncompiled: its compiled form is for GPUs."""
    model = make_model(ladder_residual={"layers": "last:2"}, cross_layer_attention=LISTED)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    outputs = []
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for implementation in ("sdpa", "eager", "flex_attention"):
            model.set_attn_implementation(implementation)
            outputs.append(model(tokens(), attention_mask=mask).logits[mask.bool()])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph(make_model, tokens):
    model = make_model(ladder_residual={"layers": "last:2"}, cross_layer_attention=SHORT_FIRST)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(tokens(), use_cache=False).logits
        torch.testing.assert_close(got, model(tokens()).logits)


def test_attentions_are_recorded(make_model, tokens):
    model = make_model(cross_layer_attention=CLA2)
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 7, 7)] * 4
    assert len(out.hidden_states) == 5
