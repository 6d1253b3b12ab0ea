"""Caches of a decoder with Cross-Layer Attention: one entry per producer, and the same tokens."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, cache_utils

from torch_plugins.cross_layer_attention import kv_bytes_per_token

CLA = {
    "none": None,
    "cla2": {"sharing_factor": 2},
    "cla3": {"sharing_factor": 3, "kv_norm": "separate"},
    "cla4": {"sharing_factor": 4},
}
LADDERS = {"dense": None, "ladder": {"layers": "all"}}

ladders = pytest.mark.parametrize("ladder", LADDERS.values(), ids=LADDERS)
patterns = pytest.mark.parametrize("cla", CLA.values(), ids=CLA)
shared = pytest.mark.parametrize("cla", list(CLA.values())[1:], ids=list(CLA)[1:])
leaves_out_consumers = pytest.mark.skipif(
    not hasattr(cache_utils, "DummyLayer"), reason="transformers 5.23 and newer do"
)


class Stream:
    """In place of the accelerator streams on which an offloaded cache copies."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, other):
        pass


@pytest.fixture
def cpu_streams(monkeypatch):
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


def build_cache(kind, config, length):
    offloading = "offloaded" in kind
    if kind == "lazy":
        return DynamicCache()
    if "static" in kind:
        return StaticCache(config=config, max_cache_len=length, offloading=offloading)
    return DynamicCache(config=config, offloading=offloading)


def stored_bytes(cache):
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.nbytes for tensor in tensors)


@patterns
@ladders
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static", "offloaded", "offloaded-static"])
def test_prefill_and_decode_equal_one_pass(make_model, tokens, cpu_streams, ladder, cla, kind):
    """And the cache holds what the formula says."""
    model = make_model(torch.float64, ladder_residual=ladder, cross_layer_attention=cla)
    config, ids = model.config, tokens(2, 11)
    cache = build_cache(kind, config, 16)
    logits, start = [], 0
    with torch.no_grad():
        for chunk in (5, 1, 3, 1, 1):
            part = ids[:, start : start + chunk]
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
            start += chunk
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-10, atol=1e-10)
    per_token = kv_bytes_per_token(config.kv_producers, 2, 6, element_bytes=8)
    assert stored_bytes(cache) == 2 * (16 if "static" in kind else 11) * per_token


@leaves_out_consumers
@shared
def test_an_offloaded_cache_fetches_producers_only(make_model, tokens, cpu_streams, cla):
    """Each in time for its own update, and the first again behind the last."""
    model = make_model(cross_layer_attention=cla)
    cache = DynamicCache(config=model.config, offloading=True)
    fetched = []
    for index, layer in enumerate(cache.layers):
        layer.prefetch = lambda index=index: fetched.append(index)
    model(tokens(), past_key_values=cache)
    producers = sorted(set(model.config.kv_producers))
    assert fetched == [*producers[1:], producers[0]]


@leaves_out_consumers
@shared
def test_an_early_initialized_static_cache_holds_producers_only(make_model, cla):
    config = make_model(cross_layer_attention=cla).config
    cache = StaticCache(config=config, max_cache_len=16)
    cache.early_initialization(2, 2, 6, torch.float64, torch.device("cpu"))
    per_token = kv_bytes_per_token(config.kv_producers, 2, 6, element_bytes=8)
    assert stored_bytes(cache) == 2 * 16 * per_token


@leaves_out_consumers
@shared
def test_a_cropped_cache_goes_on_from_there(make_model, tokens, cla):
    """As assisted decoding does with tokens that it rejects."""
    model, ids = make_model(torch.float64, cross_layer_attention=cla), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-3)
    last = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(last, model(ids).logits[:, 6:], rtol=1e-10, atol=1e-10)


@shared
@ladders
def test_generate(make_model, tokens, cpu_streams, ladder, cla):
    """Greedy and beams, with every cache and with none: the same tokens, and halved bytes."""
    model = make_model(torch.float64, ladder_residual=ladder, cross_layer_attention=cla)
    per_token = kv_bytes_per_token(model.config.kv_producers, 2, 6, element_bytes=8)
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        expected = model.generate(tokens(), use_cache=False, **options)
        for kind in (None, "static", "offloaded", "offloaded_static"):
            out = model.generate(
                tokens(),
                cache_implementation=kind,
                disable_compile=True,
                return_dict_in_generate=True,
                **options,
            )
            assert torch.equal(out.sequences, expected), kind
            cache = out.past_key_values
            length = cache.layers[0].keys.shape[-2]
            assert length >= 14
            assert stored_bytes(cache) == 2 * beams * length * per_token


@shared
@ladders
@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
def test_left_padded_batch_generates_as_each_prompt_alone(
    make_model, tokens, ladder, position, cla
):
    model = make_model(
        torch.float64,
        ladder_residual=ladder,
        cross_layer_attention=cla,
        position_embedding_type=position,
        pad_token_id=0,
    )
    prompts = [tokens(1, 3, seed=2), tokens(1, 6, seed=3)]
    batch = torch.zeros(2, 6, dtype=torch.long)
    batch[0, 3:], batch[1] = prompts[0][0], prompts[1][0]
    mask = (batch != 0).long()
    for beams in (1, 2):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        alone = [model.generate(p, **options)[0, p.shape[1] :] for p in prompts]
        together = model.generate(batch, attention_mask=mask, **options)[:, 6:]
        assert together.tolist() == [a.tolist() for a in alone]
