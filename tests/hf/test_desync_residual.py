"""Desync Residual in the decoder: ranks in one process, against the naive reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torch_plugins import reference
from torch_plugins.config import ConfigError, DesyncResidual
from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM
from torch_plugins.hf.convert import convert

PATTERNS = ("2x", "4x", "last", "11,00,10,01")


def build(pattern: str, **options: Any) -> PluginDecoderForCausalLM:
    fields = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        desync_residual={"pattern": pattern, "ranks": 2},
    )
    torch.manual_seed(0)
    model = PluginDecoderForCausalLM(PluginDecoderConfig(**{**fields, **options}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options",
    [
        {"residual_multiplier": 0.5, "qk_norm": True},
        {"normalization": "layernorm", "mlp_gated": False, "attention_bias": True},
        {"num_key_value_heads": 4, "desync_residual": {"pattern": "2x", "ranks": 4}},
    ],
    ids=["llama", "gpt", "four ranks"],
)
def test_logits_and_gradients_are_the_references(pattern: str, options: dict[str, Any]) -> None:
    ranks = options.get("desync_residual", {}).get("ranks", 2)
    options = {**options, "desync_residual": {"pattern": pattern, "ranks": ranks}}
    if options.get("attention_bias"):
        options["attention_output_bias"] = False
    model = build(pattern, **options).double()
    tensors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = model(IDS).logits
    expected = reference.logits(tensors, model.config.to_dict(), IDS)
    weights = torch.randn(logits.shape, dtype=torch.float64)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()
    for name, parameter in model.named_parameters():
        other = tensors[name].grad
        assert (parameter.grad - other).abs().max() <= 1e-12 * other.abs().max(), name


def test_a_stock_model_is_converted() -> None:
    """Its matrices stay, and every rank starts with the norms there were."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, **sizes)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    before = dict(model.named_parameters())
    result = convert(model, [DesyncResidual("11,00,10,01", 2)])
    after = dict(model.named_parameters())
    norms = [
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in (1, 2, 3)
        for n in ("input", "post_attention")
    ]
    assert result.added.keys() == result.removed.keys() == result.likes.keys() == {*norms}
    for name, parameter in after.items():
        if name in norms:
            assert torch.equal(parameter, before[name].repeat(2))
            assert result.likes[name] is before[name]
            assert result.added[name] is parameter
        else:
            assert parameter is before[name]
    expected = reference.logits(after, model.config.to_dict(), IDS)
    assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not convert(model, [DesyncResidual("11,00,10,01", 2)]).added
    with pytest.raises(ConfigError, match="norms of its ranks would have to become one"):
        convert(model, [DesyncResidual("2x", 2)])


def test_new_norms_are_ones_for_every_rank() -> None:
    model = PluginDecoderForCausalLM(build("4x").config)
    norm = model.model.layers[0].input_layernorm
    assert norm.weight.shape == (2 * 32,)
    assert (norm.weight == 1).all()


def test_a_pattern_and_a_number_of_ranks_are_functions_of_their_own() -> None:
    two = build("4x")
    other = build("2x")
    other.load_state_dict(two.state_dict())
    assert (two(IDS).logits - other(IDS).logits).abs().max() > 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_equals_full_forwards(attention: str) -> None:
    model = build("4x").eval()
    model.set_attn_implementation(attention)
    plain = {"attention_mask": torch.ones_like(IDS), "do_sample": False}
    ids = model.generate(IDS, max_new_tokens=6, **plain)
    expected = IDS
    with torch.no_grad():
        for _ in range(6):
            best = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, best), dim=1)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("4x").double()
    model(IDS, labels=IDS).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_folder_loads_with_its_own_code(tmp_path: Path) -> None:
    model = build("4x").eval()
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["desync_residual"]
    assert section == {"pattern": "4x", "ranks": 2}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"desync_residual": {"pattern": "2x"}}, "desync_residual.ranks: missing"),
        (
            {"desync_residual": {"ranks": 3}},
            "desync_residual.ranks 3: must divide num_attention_heads 4",
        ),
        (
            {"desync_residual": {"ranks": 4}},
            "desync_residual.ranks 4: must divide num_key_value_heads 2",
        ),
        ({"mlp_bias": True}, "mlp_bias True: with desync_residual"),
        ({"attention_bias": True}, "attention_output_bias True: with desync_residual"),
        ({"ladder_residual": {}}, "ladder_residual with desync_residual: drop one"),
        (
            {"cross_layer_attention": {}},
            "cross_layer_attention with desync_residual: drop one",
        ),
    ],
)
def test_wrong_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("2x", **options)


def test_transformers_tensor_parallelism_is_refused() -> None:
    from torch_plugins.hf.parallel import check

    with pytest.raises(ConfigError, match="tp_size 2: the ranks of desync_residual"):
        check(build("2x").config, 2)
