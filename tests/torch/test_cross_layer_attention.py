"""Sharing groups against the paper's figures, cache sizes against its table, and the reference."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_plugins import reference
from torch_plugins.config import ConfigError, CrossLayerAttention
from torch_plugins.cross_layer_attention import (
    PAPER_MODELS,
    kv_bytes_per_token,
    sharing_groups,
    table,
)


def groups(num_layers, **fields):
    return sharing_groups(CrossLayerAttention(**fields).resolve(num_layers))


def producers(num_layers, **fields):
    return [group[0] for group in groups(num_layers, **fields)]


def test_the_short_group_comes_first():
    """Figure 2 of the paper: 10 layers, of which CLA3 leaves layer 0 alone."""
    assert producers(10, sharing_factor=2) == [0, 2, 4, 6, 8]
    assert groups(10, sharing_factor=3) == ((0,), (1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert producers(20, sharing_factor=3) == [0, 2, 5, 8, 11, 14, 17]
    assert producers(20, sharing_factor=4) == [0, 4, 8, 12, 16]
    assert groups(3, sharing_factor=3) == ((0, 1, 2),)
    assert CrossLayerAttention().resolve(4) == (0, 0, 2, 2)


def test_named_patterns_of_20_layers_have_11_producers():
    pairs = tuple((layer, layer + 1) for layer in range(1, 18, 2))
    assert groups(20, pattern="keep-ends") == ((0,), *pairs, (19,))
    alone = tuple((layer,) for layer in range(9))
    assert groups(20, pattern="dense-front") == (*alone, tuple(range(9, 19)), (19,))
    alone = tuple((layer,) for layer in range(11, 20))
    assert groups(20, pattern="dense-back") == ((0,), tuple(range(1, 11)), *alone)
    for name in ("keep-ends", "dense-front", "dense-back"):
        assert len(groups(20, pattern=name)) == 11


@given(st.integers(1, 40), st.integers(1, 40))
def test_any_factor_gives_full_groups_but_the_first(num_layers, factor):
    if factor > num_layers:
        with pytest.raises(ConfigError, match=f"{num_layers} layers"):
            groups(num_layers, sharing_factor=factor)
        return
    found = groups(num_layers, sharing_factor=factor)
    assert [layer for group in found for layer in group] == list(range(num_layers))
    assert {len(group) for group in found[1:]} <= {factor}
    assert len(found[0]) == (num_layers % factor or factor)


@pytest.mark.parametrize("name", ["keep-ends", "dense-front", "dense-back"])
@pytest.mark.parametrize("num_layers", [4, 5, 7, 12])
def test_named_patterns_of_any_depth_are_valid(name, num_layers):
    listed = ",".join(map(str, CrossLayerAttention(pattern=name).resolve(num_layers)))
    again = CrossLayerAttention(pattern=listed).resolve(num_layers)
    assert again == CrossLayerAttention(pattern=name).resolve(num_layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharing_factor": 0}, r"sharing_factor \(--cla-sharing-factor\) 0: must be"),
        ({"sharing_factor": "2"}, "'2': must be a whole number"),
        ({"sharing_factor": 2, "pattern": "keep-ends"}, r"sharing factor \(2\), not both"),
        ({"kv_norm": "seperate"}, "did you mean 'separate'"),
        ({"pattern": "keep-end"}, "use a comma list of producers, or keep-ends"),
        ({"pattern": "0,0,2"}, "names 3 producers for 4 layers"),
        ({"pattern": "0,0,0,1"}, "layer 3 must be its own producer, 3, or share .* it, 0"),
        ({"pattern": "1,1,2,2"}, "layer 0 must be its own producer"),
        ({"pattern": "0,0,-1,-1"}, "layer 2 must be"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(fields, message):
    with pytest.raises(ConfigError, match=message):
        CrossLayerAttention(**fields).resolve(4)


def test_function_ignores_how_the_groups_were_written():
    by_factor, listed = CrossLayerAttention(2), CrossLayerAttention(pattern="0,0,2,2")
    assert by_factor.function(4) == listed.function(4)
    assert by_factor.function(4) != CrossLayerAttention(2, kv_norm="separate").function(4)
    assert by_factor.function(4) != CrossLayerAttention(4).function(4)


def test_bytes_per_token():
    assert kv_bytes_per_token(range(32), 8, 128) == 2 * 32 * 8 * 128 * 2
    assert kv_bytes_per_token((0, 0, 2, 2), 1, 64, element_bytes=4) == 2 * 2 * 64 * 4


@pytest.mark.parametrize("model", PAPER_MODELS, ids=lambda model: model.name)
def test_cache_sizes_of_the_paper(model):
    assert model.bytes_per_token == model.printed_bytes


def test_table_command():
    command = [sys.executable, "-m", "torch_plugins.cross_layer_attention"]
    run = subprocess.run([*command, "table"], capture_output=True, text=True, timeout=60)
    assert run.stdout == table() + "\n", run.stderr
    rows = run.stdout.splitlines()[1:]
    assert len(rows) == len(PAPER_MODELS) == 20
    for row in rows:
        _, _, computed, printed, _ = row.split()
        assert computed == printed


CONFIG = {
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "head_dim": 4,
    "norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0},
}


def weights(producer_layers):
    """Random tensors of a small decoder with one key-value head, without consumers' projections."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    shapes = {"model.embed_tokens": (11, 8), "model.norm": (8,)}
    for layer in range(4):
        names = {"self_attn.q_proj": (8, 8), "self_attn.o_proj": (8, 8), "input_layernorm": (8,)}
        names |= {
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
            "post_attention_layernorm": (8,),
        }
        if layer in producer_layers:
            names |= {"self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in names.items()}
    return {f"{name}.weight": draw(*shape).requires_grad_() for name, shape in shapes.items()}


def test_reference_shares_activations_of_the_producer():
    """Not its weights: projecting the consumer's own stream with them is another function."""
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    shared = weights((0, 2))
    config = CONFIG | {"cross_layer_attention": {"sharing_factor": 2}}
    out = reference.logits(shared, config, ids)
    tied = shared | {
        f"model.layers.{layer}.self_attn.{n}_proj.weight": shared[
            f"model.layers.{layer - 1}.self_attn.{n}_proj.weight"
        ]
        for layer in (1, 3)
        for n in "kv"
    }
    assert torch.equal(reference.logits(tied, config, ids), out)  # a consumer's would not be read
    assert not torch.allclose(reference.logits(tied, CONFIG, ids), out, rtol=1e-2)


def test_reference_with_factor_one_is_the_baseline():
    ids, tensors = torch.tensor([[1, 5, 3, 9, 2]]), weights(range(4))
    config = CONFIG | {"cross_layer_attention": {"sharing_factor": 1}}
    assert torch.equal(
        reference.logits(tensors, config, ids), reference.logits(tensors, CONFIG, ids)
    )


def test_separate_norm_that_is_a_copy_is_the_shared_one():
    ids, tensors = torch.tensor([[1, 5, 3, 9, 2]]), weights((0, 2))
    config = CONFIG | {"cross_layer_attention": {"sharing_factor": 2}}
    shared = reference.logits(tensors, config, ids)
    config = CONFIG | {"cross_layer_attention": {"sharing_factor": 2, "kv_norm": "separate"}}
    for layer in (0, 2):
        source = tensors[f"model.layers.{layer}.input_layernorm.weight"]
        tensors[f"model.layers.{layer}.self_attn.kv_norm.weight"] = source
    assert torch.equal(reference.logits(tensors, config, ids), shared)
    tensors["model.layers.2.self_attn.kv_norm.weight"] = 1 + source
    assert not torch.allclose(reference.logits(tensors, config, ids), shared, rtol=1e-2)
