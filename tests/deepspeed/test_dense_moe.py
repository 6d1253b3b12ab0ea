"""DS-MoE from DeepSpeed's JSON: engines on two ranks in dense_moe_cases.py, and an export."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspeed_plugins import export_hf
from deepspeed_plugins.seams import versions
from tests.megatron.harness import launch
from torch_plugins.hf import PluginDecoderForCausalLM

CASES = Path(__file__).with_name("dense_moe_cases.py")
REPEATABLE = versions.installed() >= (0, 19, 8)
"""Before, ZeRO 3 on CPU gives other weights in every run, some of them not a number."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What dense_moe_cases.py recorded."""
    folder = tmp_path_factory.mktemp("cases")
    _, logs = launch(CASES, folder / "record", folder, processes=2, timeout=200)
    return {"logs": logs, "folder": folder, **json.loads((folder / "record").read_text())}


def test_updates_equal_those_of_plain_torch_with_the_losses_written_out(cases):
    """ZeRO 0 to 3, two micro-batches, the mean of the scores over one process and over both, both
    kinds of checkpointing, evaluation between the steps."""
    assert len(cases["torch"]) == 12
    for name, seen in cases["torch"].items():
        if "ZeRO 3" in name and not REPEATABLE:
            continue
        assert seen["without"] > 0.5, name  # the losses matter
        assert seen["other reduction"] > 0.1, name  # and whose tokens the mean is over
        assert seen["error"] < 1e-5, name


def test_logged_losses_count_once(cases):
    """Under checkpointing too; sums over layers, means over micro-batches and ranks."""
    for name, seen in cases["torch"].items():
        if "ZeRO 3" in name and not REPEATABLE:
            continue
        for kind, (found, expected) in seen["logged"].items():
            assert found == pytest.approx(expected, rel=1e-5), (name, kind)


def test_ranks_compute_experts_of_their_own_under_zero_3(cases):
    """What the whole model computes with these experts, which is not what it does with all; before,
    between and after training, and without a section of the JSON."""
    first, second = cases["sparse"]
    assert any(one["experts"] != other["experts"] for one, other in zip(first, second, strict=True))
    for seen in first + second:
        assert seen["error"] < 1e-5
        assert seen["dense"] > 1e-3


def test_blocks_start_with_the_stock_models_function(cases):
    """ZeRO 0 to 3, weights that zero.Init has partitioned, and an optimizer of the script's."""
    blocks = {name: seen for name, seen in cases["conversions"].items() if "fresh" not in name}
    assert len(blocks) == 7
    for name, seen in blocks.items():
        assert seen["logits"] < 1e-6, name


def test_fresh_experts_are_drawn_like_those_of_a_new_model(cases):
    for name in ("ZeRO 1, fresh", "ZeRO 3, fresh", "partitioned, fresh"):
        seen = cases["conversions"][name]
        assert seen["logits"] > 0.1, name
        for weight, spread in seen["spread"].items():
            if "layernorm" not in weight:
                assert 0.01 < spread < 0.04, (name, weight)


def test_added_routers_are_the_same_on_all_ranks_and_train(cases):
    """Whatever numbers a rank draws; all else trains too."""
    for name, seen in cases["conversions"].items():
        assert seen["alike"], name
        assert seen["still"] == [], name


def test_what_an_engine_says(cases):
    lines = cases["logs"][0].splitlines()
    told = "4 experts, 2 attention experts in 2 layers, mlp routers; evaluation dense, dense"
    assert f"dense-moe: {told}" in lines
    losses = "mi_attention (coefficient 0.5) in 2 modules, mi_mlp (coefficient 0.8) in 2 modules"
    assert f"auxiliary-losses: {losses}" in lines
    assert "dense-moe" not in cases["logs"][1]


REFUSED = {
    "autotp": "dense_moe with tensor_parallel.autotp_size 2: it would cut the matrices of experts",
    "autotp without section": "drop tensor_parallel and use ZeRO",
    "experts": "num_experts 3: must divide the model's intermediate_size 40",
    "gated": "gated False: the model's MLP says True (mlp_gated); set that",
    "heads": "attention_experts 4: a key-value head has 2 query heads; use 2",
    "init": "expert_init 'block': unknown; did you mean 'blocks'?",
    "lone": "expert_init: goes with dense_moe only",
    "pipeline": "dense_moe: a PipelineModule is cut into stages",
}


def test_refused_by_name(cases):
    assert cases["refused"].keys() == REFUSED.keys()
    for name, message in REFUSED.items():
        assert message in cases["refused"][name]


def test_an_export_computes_what_the_engine_computed(cases, tmp_path, capsys):
    out = tmp_path / "out"
    assert export_hf.main([str(cases["folder"] / "sure"), str(out)]) == 0
    assert "as plugin_decoder" in capsys.readouterr().out
    kept = torch.load(cases["folder"] / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model) is PluginDecoderForCausalLM
    assert model.config.experts.num_experts == 4
    assert model.config.experts.gated
    torch.testing.assert_close(model(kept["ids"]).logits, kept["logits"], rtol=1e-5, atol=1e-5)
