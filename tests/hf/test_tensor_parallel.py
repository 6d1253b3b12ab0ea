"""The decoder under torchrun, divided by transformers: one process' results, in another order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from torch_plugins.config import ConfigError
from torch_plugins.hf.parallel import STYLE, check, overlap

CASES = Path(__file__).with_name("tensor_parallel_cases.py")
ALL = {"ladder_residual": {"layers": "all"}}
BIASED = {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.4}
MODELS = {
    "all": {**ALL, **BIASED},
    "partial, tied": {"ladder_residual": {"layers": "1-2"}, "tie_word_embeddings": True},
    "cla": {
        "ladder_residual": {"layers": "last:3"},
        "cross_layer_attention": {"sharing_factor": 3, "kv_norm": "separate"},
        "qk_norm": True,
    },
    "gpt": {
        "ladder_residual": {"layers": "0,2"},
        "normalization": "layernorm",
        "mlp_gated": False,
        "position_embedding_type": "learned_absolute",
        **BIASED,
    },
    "dense": {},
    "short": {**ALL, **BIASED, "num_hidden_layers": 2},
}
FOUR = {"all": {**ALL, **BIASED, "num_key_value_heads": 4, "intermediate_size": 42}}
"""Four heads, one a process; the last process has a smaller part of the MLP."""
REFUSED = {
    "experts": {"dense_moe": {"num_experts": 5, "gated": True}, **ALL},
    "one head": {"num_key_value_heads": 1},
}
STARTED = {"all": 7, "partial, tied": 4, "cla": 6, "gpt": 3, "dense": 0, "short": 3}
"""All-reduces of a forward pass that the next module hides."""


def one_process(model, ids, mask):
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        cached = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
        whole = model(ids, attention_mask=mask, output_hidden_states=True)
        generated = model.generate(ids, **options)
    return {
        "logits": whole.logits,
        "cached": torch.cat(cached, dim=1),
        "generated": generated,
        "static": generated,
        "states": torch.stack(whole.hidden_states),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the cases; what one process and what the processes computed, and the record."""

    def start(models, refused, processes, ids, compiled=()):
        work = tmp_path_factory.mktemp("tp")
        for name, model in (models | refused).items():
            model.save_pretrained(work / name)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0  # left padding
        save_file({"ids": ids, "mask": mask}, work / "given.safetensors")
        plan = {"models": list(models), "refused": list(refused), "compiled": list(compiled)}
        (work / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(CASES), str(work)]
        settings = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch would import our entry point
        }
        process = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, timeout=240
        )
        assert process.returncode == 0, process.stderr[-4000:]
        expected = {name: one_process(model, ids, mask) for name, model in models.items()}
        record = json.loads((work / "record.json").read_text())
        assert record["ours"] == []
        return expected, load_file(work / "out.safetensors"), record

    return start


def in_fp64(make_model, cases):
    return {name: make_model(torch.float64, **case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def two(run, make_model, tokens):
    models, refused = (in_fp64(make_model, cases) for cases in (MODELS, REFUSED))
    return run(models, refused, 2, tokens(), compiled=["short"])


@pytest.fixture(scope="module")
def four(run, make_model, tokens):
    models, refused = (in_fp64(make_model, cases) for cases in (FOUR, {"two heads": ALL}))
    return run(models, refused, 4, tokens())


def assert_equal(expected, out, name):
    for key, value in expected[name].items():
        torch.testing.assert_close(out[f"{name}.{key}"], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_does(two, name):
    """A padded batch, cached steps, generated tokens and hidden states."""
    expected, out, _ = two
    assert_equal(expected, out, name)
    assert len(set(expected[name]["generated"][:, 7:].flatten().tolist())) > 2


def test_four_processes_compute_what_one_does(four):
    expected, out, record = four
    assert_equal(expected, out, "all")
    assert_order(record["all"]["prefill"])
    assert record["all"]["bitwise"]


def assert_order(events):
    """All-reduce n of 0 to 6 starts before module n + 1 does, and is waited for once that has
    launched its own."""
    for n in range(7):
        chain = [f"launch {n}", f"done {n}", f"start {n + 1}", f"done {n + 1}", f"wait {n}"]
        places = [events.index(event) for event in chain]
        assert places == sorted(places), (n, events)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_next_module_runs_under_every_all_reduce(two, phase):
    _, _, record = two
    assert_order(record["all"][phase])
    for name, count in STARTED.items():
        events = record[name][phase]
        assert sum(event.startswith("launch") for event in events) == count, name
        waits = [event for event in events if event.startswith("wait")]
        for n in (int(event.split()[1]) for event in waits):
            assert events.index(f"wait {n}") > events.index(f"done {n + 1}"), name


@pytest.mark.parametrize("name", MODELS)
def test_a_buffer_in_flight_is_never_read(two, name):
    """The buffers hold NaN until they are waited for, and all are."""
    _, _, record = two
    assert record[name]["bitwise"]
    assert record[name]["left"] == 0


def test_the_inductors_passes_place_the_waits(two):
    """torch traces a wait behind its all-reduce; all-reduce 0 is the embedding's, and 1 to 3 those
    that the ladder hides."""
    _, _, record = two
    seen = record["short compiled"]
    assert seen["apart"] <= 1e-9
    for n in range(5):
        traced = seen["traced"].index(f"launch {n}")
        assert seen["traced"][traced + 1] == f"wait {n}"
    graph = seen["passes"]
    for n in range(1, 4):
        places = [graph.index(event) for event in (f"launch {n}", f"launch {n + 1}", f"wait {n}")]
        assert places == sorted(places)
        assert graph[places[0] : places[1]].count("product") == (3 if n % 2 else 4)


def test_what_cannot_be_divided_is_refused(two, four, make_config):
    refused = two[2]["refused"] | four[2]["refused"]
    assert refused["experts"].startswith("ConfigError: tp_size 2: dense_moe has no")
    assert refused["one head"] == "ConfigError: tp_size 2: must divide num_key_value_heads 1"
    assert refused["two heads"] == "ConfigError: tp_size 4: must divide num_key_value_heads 2"
    check(make_config(**REFUSED["experts"]), 1)
    with pytest.raises(ConfigError, match="tp_size 3: must divide num_attention_heads 4"):
        check(make_config(), 3)


def test_only_what_a_ladder_hides_is_renamed(make_model):
    """And the plan that other readers see stays in the common names."""
    model = make_model(ladder_residual={"layers": "1-2"})
    names = [n for n, _ in model.named_modules() if n.endswith(("o_proj", "down_proj"))]
    plan = dict.fromkeys(names, "rowwise")
    for prefix, decoder in (("model.", model), ("", model.model)):
        own = {name.removeprefix("model.") for name in names}
        renamed = overlap(decoder, {prefix + name: "rowwise" for name in own})
        assert {name for name, style in renamed.items() if style == STYLE} == {
            f"{prefix}layers.{name}"
            for name in ("0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj")
        } | {f"{prefix}layers.2.self_attn.o_proj"}
    assert [layer.hands_over for layer in model.model.layers] == [True, True, False, False]
    others = overlap(model, dict.fromkeys(plan, "rowwise_rep"))
    assert set(others.values()) == {"rowwise_rep"}
    assert not any(layer.hands_over for layer in model.model.layers)
    assert STYLE not in model.config.base_model_tp_plan.values()
    assert STYLE not in model.tp_plan.values()


def test_layers_that_hand_over_compute_the_same(make_model, tokens):
    """In one process too, with gradients and checkpointing; a hook sees whole hidden states."""
    model, ids = make_model(torch.float64, **ALL), tokens()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    states = AutoModelForCausalLM.from_config(model.config).to(torch.float64).eval()
    states.load_state_dict(model.state_dict())
    states = states(ids, output_hidden_states=True).hidden_states
    for layer in model.model.layers[:-1]:
        layer.hands_over = True
    torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=1e-12)
    for reentrant in (True, False):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=1e-12)
    model.eval()
    watched = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(watched, states, rtol=1e-12, atol=1e-12)
