"""What the vLLM model refuses, and that its package needs no vLLM until vLLM calls it."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tomllib

from torch_plugins.config import FEATURES, ConfigError
from torch_plugins.vllm.refusals import SERVED, check

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0] * 3,
    "short_factor": [1.0] * 3,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"hidden_act": "relu2"}, {}, "hidden_act 'relu2' of a gated MLP: vLLM has gelu,"),
        ({"hidden_act": "mish", "mlp_gated": False}, {}, "hidden_act 'mish' of an ungated MLP"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rope_type 'dynamic'"),
        ({"rope_parameters": LONGROPE}, {}, "rope_type 'longrope': served are default,"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            {"tensor_parallel": 2},
            "num_key_value_heads 3 with --tensor-parallel-size 2",
        ),
        (
            {"dense_moe": {"attention_experts": 2}},
            {},
            "dense_moe: DS-MoE is not served .* qwen2_moe or qwen3_moe",
        ),
        ({}, {"quantization": "fp8"}, "--quantization fp8: serve this model unquantized"),
        ({}, {"fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(make_config, fields, options, message):
    with pytest.raises(ConfigError, match=message):
        check(make_config(**fields), **options)


@pytest.mark.parametrize(
    ("producers", "starts", "message"),
    [
        ("0,0,2,2", (0, 1), r"size 2: a stage starts at layer 1, .* of layer 0; .*PARTITION=2,2$"),
        ("0,0,0,3", (0, 2), "PARTITION=3,1$"),
        ("0,0,0,0", (0, 2), "at most 1 stages fit$"),
        ("0,1,1,1,1,1,6,7", (0, 2, 4, 6), "layer 2, .* of layer 1; .*PARTITION=1,5,1,1$"),
    ],
)
def test_a_stage_must_start_with_a_producer(make_config, producers, starts, message):
    layers = producers.count(",") + 1
    section = {"pattern": producers}
    config = make_config(num_hidden_layers=layers, cross_layer_attention=section)
    with pytest.raises(ConfigError, match=message):
        check(config, stage_starts=starts)


def test_what_is_served(make_config):
    check(make_config())
    check(make_config(position_embedding_type="none"), tensor_parallel=4)
    check(
        make_config(ladder_residual={"layers": "all"}, cross_layer_attention={"sharing_factor": 2}),
        stage_starts=(0, 2),
    )


def test_a_feature_that_the_model_has_not_is_refused(make_config, monkeypatch):
    monkeypatch.setattr("torch_plugins.vllm.refusals.SERVED", SERVED[:1])
    assert set(SERVED) <= set(FEATURES)
    check(make_config(ladder_residual={"layers": "all"}))
    with pytest.raises(ConfigError, match="Cross-Layer Attention is not served"):
        check(make_config(cross_layer_attention={"sharing_factor": 2}))


def test_the_entry_point_is_silent_without_vllm():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((_, target),) = project["entry-points"]["vllm.general_plugins"].items()
    module, function = target.split(":")
    assert callable(getattr(import_module(module), function))
    heavy = "{'torch', 'transformers', 'vllm'} & set(sys.modules)"
    code = f"import sys, {module}; print({heavy})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("set()\n", "")
