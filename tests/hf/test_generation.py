"""Caches, padding and generate()."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

LADDERS = [None, {"layers": "all"}, {"layers": "1-2"}]
POSITIONS = ["rope", "learned_absolute"]

ladders = pytest.mark.parametrize("ladder", LADDERS, ids=["dense", "all", "1-2"])
positions = pytest.mark.parametrize("position", POSITIONS)


@ladders
@positions
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps_equal_one_pass(make_model, tokens, ladder, position, kind):
    model = make_model(torch.float64, ladder_residual=ladder, position_embedding_type=position)
    ids = tokens(2, 11)
    whole = model(ids).logits
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=16)
    logits, start = [], 0
    with torch.no_grad():
        for chunk in (5, 1, 3, 1, 1):
            part = ids[:, start : start + chunk]
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
            start += chunk
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_the_cache(make_model, tokens, name):
    """transformers 5.24 renamed the argument; ``**kwargs`` would swallow the other in silence."""
    model, ids = make_model(torch.float64, ladder_residual={"layers": "all"}), tokens()
    for run in (model, model.model):
        cache = DynamicCache(config=model.config)
        run(ids[:, :5], **{name: cache})
        last = run(ids[:, 5:], **{name: cache})[0]
        torch.testing.assert_close(last, run(ids)[0][:, 5:], rtol=1e-10, atol=1e-10)


@ladders
@positions
def test_left_padded_batch_generates_as_each_prompt_alone(make_model, tokens, ladder, position):
    model = make_model(
        torch.float64,
        ladder_residual=ladder,
        position_embedding_type=position,
        pad_token_id=0,
    )
    options = {"max_new_tokens": 8, "do_sample": False}
    prompts = [tokens(1, 3, seed=2), tokens(1, 6, seed=3)]
    alone = [model.generate(p, **options)[0, p.shape[1] :] for p in prompts]
    batch = torch.zeros(2, 6, dtype=torch.long)
    batch[0, 3:], batch[1] = prompts[0][0], prompts[1][0]
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)[:, 6:]
    assert together.tolist() == [a.tolist() for a in alone]
    assert len(set(together.flatten().tolist())) > 2  # not one token repeated


@ladders
def test_generate_with_cache_equals_without(make_model, tokens, ladder):
    model = make_model(torch.float64, ladder_residual=ladder)
    options = {"max_new_tokens": 10, "do_sample": False}
    with_cache = model.generate(tokens(), use_cache=True, **options)
    without = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(with_cache, without)
    static = model.generate(
        tokens(), cache_implementation="static", disable_compile=True, **options
    )
    assert torch.equal(with_cache, static)


def test_beam_search_reorders_the_cache(make_model, tokens):
    model = make_model(torch.float64, ladder_residual={"layers": "all"})
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(
        model.generate(tokens(), use_cache=True, **options),
        model.generate(tokens(), use_cache=False, **options),
    )
