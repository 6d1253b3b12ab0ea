"""Layers that are computed one after another for all batches, against plain forward passes."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.hf.w4a4_models import ids, llama, plugin
from torch_plugins.config import ConfigError
from torch_plugins.w4a4.layers import Pass, Passes, decoder_layers


def waiting():
    return [thread for thread in threading.enumerate() if isinstance(thread, Pass)]


@pytest.mark.parametrize("build", [llama, plugin])
@torch.no_grad()
def test_every_layer_is_given_what_a_forward_pass_gives_it(build):
    model = build().eval()
    prefix, layers = decoder_layers(model)
    assert prefix == "model.layers"
    batches = list(ids(3).split(1))
    seen = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    expected = [model(input_ids=batch).logits for batch in batches]
    plain, seen[:] = list(seen), []
    with Passes(model, layers, batches, probe=batches[1]) as passes:
        for index in range(len(layers)):
            for _ in range(2):  # any number of times
                seen.clear()
                for run in passes.inputs(index):
                    run()
                rows = plain[index :: len(layers)]
                assert len(seen) == len(rows) == 3
                for mine, theirs in zip(seen, rows, strict=True):
                    assert torch.equal(mine[0], theirs[0])
                    assert torch.equal(mine[1], theirs[1])
            passes.advance(index)
        assert torch.equal(passes.logits(), expected[1])
    assert waiting() == []
    assert torch.equal(model(input_ids=batches[2]).logits, expected[2])


@torch.no_grad()
def test_an_error_ends_all_passes():
    model = llama().eval()
    _, layers = decoder_layers(model)

    def fail():
        with Passes(model, layers, [ids(2)], ids(1)) as passes:
            passes.advance(0)
            passes.advance(7)

    with pytest.raises(IndexError):
        fail()
    model.model.embed_tokens = None
    with pytest.raises(TypeError), Passes(model, layers, [ids(2)]):
        pass
    assert waiting() == []
    assert "forward" not in vars(layers[0])
    with pytest.raises(ConfigError, match=r"no nn\.ModuleList with linear layers"):
        decoder_layers(model.lm_head)
