"""The decoder against the naive reference: logits and all gradients, in fp64."""

import pytest
import torch
from transformers import AttentionInterface

from torch_plugins import reference

LADDERS = [None, {"layers": "all"}, {"layers": "last:2"}, {"layers": "0,2"}, {"layers": "none"}]
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    "llama": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
    "gpt": {
        "normalization": "layernorm",
        "mlp_gated": False,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": None,
        "position_embedding_type": "learned_absolute",
        "tie_word_embeddings": True,
    },
    "qkv-bias": {"attention_bias": True, "attention_output_bias": False},
    "layernorm-without-bias-mqa": {
        "normalization": "layernorm",
        "norm_bias": False,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "mlp_gated": False,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "partial-rotary": {
        "head_dim": 12,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
        "hidden_act": "gelu",
    },
    "llama3-rope": {"rope_parameters": LLAMA3, "hidden_act": "relu2", "mlp_gated": False},
    "linear-rope": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    "no-position": {"position_embedding_type": "none", "hidden_act": "gelu_new"},
}


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda x: "dense" if x is None else x["layers"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_the_reference(make_model, tokens, shape, ladder):
    model = make_model(torch.float64, **shape, ladder_residual=ladder)
    parameters = dict(model.named_parameters())
    config, ids = model.config.to_diff_dict(), tokens(2, 9)
    expected = reference.logits(parameters, config, ids)
    got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    upstream = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view_as(got)
    want = torch.autograd.grad(expected, list(parameters.values()), upstream)
    have = torch.autograd.grad(got, list(parameters.values()), upstream)
    for name, a, b in zip(parameters, have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_no_ladder_layer_is_bitwise_dense(make_model, tokens):
    dense, none = make_model(), make_model(ladder_residual={"layers": "none"})
    assert torch.equal(dense(tokens()).logits, none(tokens()).logits)


def test_ladder_changes_the_function(make_model, tokens):
    dense, ladder = make_model(), make_model(ladder_residual={"layers": "last:1"})
    assert not torch.allclose(dense(tokens()).logits, ladder(tokens()).logits, rtol=1e-2)


@pytest.mark.parametrize("ladder", LADDERS[:3], ids=["dense", "all", "last:2"])
def test_sdpa_equals_eager(make_model, tokens, ladder):
    model = make_model(torch.float64, ladder_residual=ladder)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs.append(model(tokens(), attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_a_registered_attention_gets_the_callers_arguments(make_model, tokens):
    """How an inference engine plugs its own attention and cache into the model."""
    model = make_model(torch.float64, ladder_residual={"layers": "all"})
    expected = model(tokens()).logits
    calls = []

    def attend(module, query, key, value, mask, scaling, **kwargs):
        calls.append(kwargs["instances"][module.layer_idx])
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("engine", attend)
    model.set_attn_implementation("engine")
    out = model(tokens(), instances=["a", "b", "c", "d"], use_cache=False)
    assert calls == ["a", "b", "c", "d"]
    torch.testing.assert_close(out.logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ladder", LADDERS[:3], ids=["dense", "all", "last:2"])
def test_compiles_as_one_graph(make_model, tokens, ladder):
    model = make_model(ladder_residual=ladder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(tokens(), use_cache=False).logits
        torch.testing.assert_close(got, model(tokens()).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("ladder", LADDERS[:3], ids=["dense", "all", "last:2"])
def test_gradient_checkpointing_is_exact(make_model, tokens, ladder, use_reentrant):
    model = make_model(torch.float64, ladder_residual=ladder).train()
    ids = tokens()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = gradients()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-12, atol=1e-12)


def test_hidden_states_and_attentions_are_recorded(make_model, tokens):
    model = make_model(ladder_residual={"layers": "all"})
    model.set_attn_implementation("eager")
    out = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5
    torch.testing.assert_close(out.hidden_states[0], model.model.embed_tokens(tokens()))
    torch.testing.assert_close(
        model.lm_head(out.hidden_states[-1]) / model.config.logits_scaling, out.logits
    )
    assert [tuple(w.shape) for w in out.attentions] == [(2, 4, 7, 7)] * 4
    assert isinstance(model(tokens(), return_dict=False), tuple)


def test_loss_and_logits_to_keep(make_model, tokens):
    model, ids = make_model(), tokens()
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    keep = torch.tensor([0, 3])
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, out.logits[:, keep])


def test_inputs_embeds_equal_input_ids(make_model, tokens):
    model = make_model(embedding_multiplier=2.0)
    embeds = model.get_input_embeddings()(tokens())
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(tokens(), inputs_embeds=embeds)
