"""DS-MoE in the decoder: against the naive reference, and against what must equal it, in fp64."""

import copy
import math

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from torch_plugins import reference
from torch_plugins.auxiliary_loss import Scope, bind, losses_of
from torch_plugins.config import ConfigError
from torch_plugins.dense_moe import mutual_information_loss, router_logits
from torch_plugins.hf.attention import eager_attention
from torch_plugins.hf.experts import PluginDecoderDenseMoE, PluginDecoderDenseMoEAttention

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
MLP = {"num_experts": 5, "gated": True, "router_hidden_size": 7}
"""8 wide each."""
BOTH = MLP | {"attention_experts": 2}
GELU = {"mlp_gated": False, "hidden_act": "gelu"}
SHAPES = {
    "swiglu": {"dense_moe": BOTH},
    "gelu": GELU | {"dense_moe": BOTH | {"gated": False, "router": "linear"}},
    "mlp only": {"dense_moe": MLP | {"router": "linear"}, "attention_bias": True},
    "attention only, all heads of one key-value head": {
        "dense_moe": {"attention_experts": 4},
        "num_key_value_heads": 1,
        "mlp_bias": True,
    },
    "ladder, CLA, qk norm, biases, partial rotary, tied": {
        "dense_moe": BOTH,
        "ladder_residual": {"layers": "1-2"},
        "cross_layer_attention": {"sharing_factor": 3, "kv_norm": "separate"},
        "qk_norm": True,
        "attention_bias": True,
        "attention_output_bias": False,
        "head_dim": 12,
        "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
    },
    "gpt": GELU
    | {
        "dense_moe": BOTH | {"gated": False},
        "normalization": "layernorm",
        "position_embedding_type": "learned_absolute",
        "residual_multiplier": 0.4,
    },
}
TOP_K = {"inference": "top-k", "top_k": 2}
THRESHOLD = {"inference": "threshold", "threshold": 0.6}
CHOICES = {
    "top-k": TOP_K,
    "threshold": THRESHOLD,
    "threshold-top-k": {"inference": "threshold-top-k", "threshold": 0.6},
    "threshold-top-k, at most 2": {"inference": "threshold-top-k", "top_k": 2, "threshold": 0.0},
}


def choice_for(section, choice):
    """A choice for the kinds of experts that the model has."""
    asked = dict(choice) if section.get("num_experts") else {}
    if section.get("attention_experts"):
        asked["attention_inference"] = choice["inference"]
        asked["threshold"] = choice.get("threshold", 0.48)
        if "top_k" in choice:
            asked["attention_top_k"] = 1
    return asked


def gradients(model, logits):
    parameters = dict(model.named_parameters())
    upstream = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    found = torch.autograd.grad(logits, list(parameters.values()), upstream, retain_graph=True)
    return dict(zip(parameters, found, strict=True))


def assert_same_gradients(model, logits, expected):
    have, want = gradients(model, logits), gradients(model, expected)
    for name in want:
        torch.testing.assert_close(
            have[name], want[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense_and_sparse_equal_the_reference(make_model, tokens, shape):
    model = make_model(torch.float64, **shape)
    parameters, ids = dict(model.named_parameters()), tokens(2, 9)
    expected = reference.logits(parameters, model.config.to_diff_dict(), ids)
    dense = model(ids).logits
    torch.testing.assert_close(dense, expected, **CLOSE)
    assert_same_gradients(model, dense, expected)
    routers = [name for name in parameters if "router" in name]
    assert all(gradients(model, dense)[name].abs().min() > 0 for name in routers)

    for choice in CHOICES.values():
        model.set_experts(**choice_for(shape["dense_moe"], choice))
        expected = reference.logits(parameters, model.config.to_diff_dict(), ids)
        sparse = model(ids).logits
        torch.testing.assert_close(sparse, expected, **CLOSE)
        assert not torch.allclose(sparse, dense, rtol=1e-3)
        assert_same_gradients(model, sparse, expected)
        assert torch.equal(model.train()(ids).logits, dense)  # training computes all
        model.eval()


def test_all_experts_kept_is_dense(make_model, tokens):
    model, ids = make_model(torch.float64, dense_moe=BOTH), tokens()
    dense = model(ids).logits
    for rule in (
        {"inference": "top-k", "top_k": 5, "attention_inference": "top-k", "attention_top_k": 2},
        {"inference": "threshold", "attention_inference": "threshold", "threshold": 0},
    ):
        model.set_experts(**rule)
        assert all(layer.mlp.router.sparse for layer in model.model.layers)
        torch.testing.assert_close(model(ids).logits, dense, **CLOSE)


@pytest.mark.parametrize("gelu", [{}, GELU], ids=["swiglu", "gelu"])
def test_uniform_gates_divide_the_dense_modules(make_model, tokens, gelu):
    """A router of zeros: MLP / N and grouped-query attention / A."""
    plain = make_model(torch.float64, **gelu)
    section = BOTH | {"gated": not gelu}
    model = make_model(torch.float64, dense_moe=section, **gelu)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert all("router" in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    with torch.no_grad():
        for layer, stock in zip(model.model.layers, plain.model.layers, strict=True):
            layer.mlp.router.weight.zero_()
            layer.self_attn.router.weight.zero_()
            stock.mlp.down_proj.weight /= 5
            stock.self_attn.o_proj.weight /= 2
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, **CLOSE)


def chunks(model, ids, sizes):
    cache, start, logits = DynamicCache(config=model.config), 0, []
    with torch.no_grad():
        for size in sizes:
            part = ids[:, start : start + size]
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
            start += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize("features", [{}, SHAPES[next(k for k in SHAPES if "CLA" in k)]])
def test_generation_with_a_cache(make_model, tokens, features):
    """Prefill, a chunk and single steps equal one pass, except where K depends on the batch."""
    model = make_model(torch.float64, **{"dense_moe": BOTH, "pad_token_id": 0} | features)
    ids = tokens(2, 11)
    for choice in (None, *CHOICES.values()):
        if choice is not None:
            model.set_experts(**choice_for(BOTH, choice))
        alike = torch.allclose(chunks(model, ids, (5, 1, 3, 1, 1)), model(ids).logits, **CLOSE)
        assert alike == (choice != CHOICES["threshold-top-k"])
    model.set_experts(**choice_for(BOTH, THRESHOLD))
    options = {"max_new_tokens": 6, "do_sample": False}
    prompts = [tokens(1, 3, seed=2), tokens(1, 6, seed=3)]
    alone = [model.generate(p, **options)[0, p.shape[1] :] for p in prompts]
    batch = torch.zeros(2, 6, dtype=torch.long)
    batch[0, 3:], batch[1] = prompts[0][0], prompts[1][0]
    mask = (batch != 0).long()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        together = model.generate(batch, attention_mask=mask, **options)[:, 6:]
        assert together.tolist() == [a.tolist() for a in alone]
    static = model.generate(
        batch,
        attention_mask=mask,
        cache_implementation="static",
        disable_compile=True,
        **options,
    )
    assert torch.equal(static[:, 6:], together)


def test_an_attention_that_hides_its_mask_is_refused_when_sparse(make_model, tokens):
    model = make_model(dense_moe=BOTH | {"attention_inference": "threshold"})
    AttentionInterface.register("own", eager_attention)
    model.set_attn_implementation("own")
    with pytest.raises(ConfigError, match=r"'own'.*attention_inference.*sdpa or eager"):
        model(tokens())
    model.set_experts(attention_inference="dense")
    model(tokens())


def losses_by_hand(model, ids):
    """Cross-entropy, and both losses summed over the layers, from recorded router inputs."""
    inputs, handles = {}, []
    for layer, each in enumerate(model.model.layers):
        for kind in ("mlp", "self_attn"):
            router = getattr(each, kind).router
            keep = lambda m, args, k=(kind, layer): inputs.__setitem__(k, (m, args[0]))  # noqa: E731
            handles.append(router.register_forward_pre_hook(keep))
    loss = model(ids, labels=ids).loss
    sums = {"mlp": 0.0, "self_attn": 0.0}
    for (kind, _), (router, x) in inputs.items():
        logits = router_logits(x, router.weight, router.hidden.weight)
        sums[kind] = sums[kind] + mutual_information_loss(logits)
    for handle in handles:
        handle.remove()
    return loss, sums["mlp"], sums["self_attn"]


def test_both_losses_train_and_need_a_scale(make_model, tokens):
    weights = {"mi_weight_mlp": 0.3, "mi_weight_attention": 0.2}
    model, ids = make_model(torch.float64, dense_moe=BOTH | weights).train(), tokens()
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"(?s)bind\(model, scope\).*mi_weight_attention 0"):
        model(ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match=r"mi_weight_attention 0"):
        copy.deepcopy(model)(ids, labels=ids).loss.backward()
    model.zero_grad()

    quiet = make_model(torch.float64, dense_moe=BOTH | dict.fromkeys(weights, 0)).train()
    quiet.load_state_dict(model.state_dict())
    assert losses_of(quiet) == []
    loss, mlp, attention = losses_by_hand(quiet, ids)
    (0.5 * (loss + 0.3 * mlp + 0.2 * attention)).backward()
    assert -math.log(5) * 4 < mlp < 0

    scope = Scope()
    assert len(bind(model, scope)) == 8
    scope.scale = 0.5
    for checkpointing in (None, True, False):
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.zero_grad()
        (0.5 * model(ids, labels=ids).loss).backward()
        scope.check()
        taken = scope.take()
        torch.testing.assert_close(taken["mi_mlp"], mlp.float())
        torch.testing.assert_close(taken["mi_attention"], attention.float())
        for (name, mine), other in zip(model.named_parameters(), quiet.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **CLOSE, msg=name)
    with torch.no_grad():
        model(ids)
    model.eval()(ids, labels=ids).loss.backward()  # evaluation attaches nothing
    assert scope.take() == {}


def test_saved_and_loaded_with_its_choice(make_model, tokens, tmp_path):
    model = make_model(dense_moe=BOTH)
    model.set_experts(**choice_for(BOTH, TOP_K))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.dense_moe == model.config.dense_moe
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dense_moe=BOTH)
    assert not other.model.layers[0].mlp.router.sparse
    fresh = make_model(dense_moe=BOTH | {"router_hidden_size": 99}).model.layers[0].mlp.router
    model._init_weights(fresh)
    assert 0.015 < fresh.weight.std() < 0.025


def test_compiles_as_one_graph_where_all_experts_compute(make_model, tokens):
    model = make_model(dense_moe=BOTH)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(tokens(), use_cache=False).logits
        torch.testing.assert_close(got, model(tokens()).logits)


def test_attentions_are_recorded(make_model, tokens):
    model = make_model(dense_moe=BOTH)
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert [tuple(w.shape) for w in out.attentions] == [(2, 4, 7, 7)] * 4
    assert len(out.hidden_states) == 5


def test_only_layers_with_experts_have_other_classes(make_model):
    layer = make_model(dense_moe=MLP).model.layers[0]
    assert type(layer.mlp) is PluginDecoderDenseMoE
    assert not isinstance(layer.self_attn, PluginDecoderDenseMoEAttention)
    layer = make_model(dense_moe={"attention_experts": 2}).model.layers[0]
    assert not isinstance(layer.mlp, PluginDecoderDenseMoE)
    assert type(layer.self_attn) is PluginDecoderDenseMoEAttention


def test_a_wrong_choice_changes_nothing(make_model, tokens):
    model = make_model(dense_moe=MLP)
    before = model.config.dense_moe, model(tokens()).logits
    for choice, message in (
        ({"inference": "top-k"}, "needs dense_moe.top_k"),
        ({"inference": "top-k", "top_k": 6}, "there are 5 experts"),
        ({"top_k": 2}, "does nothing with"),
        ({"attention_inference": "threshold"}, "no attention_experts"),
        ({"threshhold": 0.1}, "did you mean 'threshold'"),
        ({"num_experts": 8}, "set_experts: num_experts; did you mean|known"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.set_experts(**choice)
    assert model.config.dense_moe == before[0]
    assert torch.equal(model(tokens()).logits, before[1])
    model.set_experts(**TOP_K)
    model.set_experts(inference="threshold")  # takes top_k with it
    assert model.config.dense_moe == MLP | {"inference": "threshold"}
    with pytest.raises(ConfigError, match="no dense_moe"):
        make_model().set_experts(inference="dense")


def test_a_replaced_projection_is_refused_when_sparse(make_model, tokens):
    """An adapter's function is not in the weight that sparse experts read."""

    class Adapted(torch.nn.Linear):
        pass

    model = make_model(dense_moe=BOTH)
    layer = model.model.layers[0]
    for module, name in ((layer.mlp, "gate_proj"), (layer.self_attn, "o_proj")):
        plain = getattr(module, name)
        other = Adapted(plain.in_features, plain.out_features, bias=False)
        other.load_state_dict(plain.state_dict())
        setattr(module, name, other)
        model.set_experts(inference="dense", attention_inference="dense")
        model(tokens())
        model.set_experts(**choice_for(BOTH, THRESHOLD))
        with pytest.raises(ConfigError, match=rf"{name} is a .*Adapted.*merge adapters"):
            model(tokens())
        setattr(module, name, plain)
