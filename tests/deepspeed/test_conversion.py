"""Features of the model from DeepSpeed's JSON: engines on one and two ranks in conversion_cases.py,
exports of what they saved, and scripts that know nothing of the plugins."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deepspeed_plugins import export_hf
from deepspeed_plugins.features import features_of
from deepspeed_plugins.parameters import follow
from deepspeed_plugins.seams import versions
from tests.deepspeed.trainer_cases import Pieces
from tests.megatron.harness import launch
from torch_plugins.config import ConfigError, CrossLayerAttention, LadderResidual
from torch_plugins.hf import PluginDecoderForCausalLM
from torch_plugins.hf.convert import Conversion

CASES = Path(__file__).with_name("conversion_cases.py")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """By number of ranks, what conversion_cases.py recorded, and the folder of its checkpoints."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("cases")
        _, logs = launch(CASES, folder / "record", folder, processes=ranks, timeout=400)
        record = json.loads((folder / "record").read_text())
        found[ranks] = record | {"folder": folder, "logs": logs}
    return found


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def cases(request, recorded):
    return recorded[request.param]


def test_every_feature_trains_as_plain_torch_does(cases):
    """ZeRO 0 to 3: losses and parameters after 4 steps; engines sum in another order."""
    assert len(cases["torch"]) == {1: 4, 2: 16}[len(cases["logs"])]
    for name, seen in cases["torch"].items():
        assert seen["losses"] < 1e-5, name
        assert seen["parameters"] < 1e-4, name


def test_a_resumed_run_ends_as_the_straight_one(cases):
    """To the bit; the script's client state comes back without the plugins' part of it."""
    for name, seen in cases["torch"].items():
        assert seen["resumed"], name
        assert seen["state"] == {"mine": int(name[-1])}


def test_one_line_per_feature_from_rank_0(recorded):
    lines = recorded[2]["logs"][0].splitlines()
    assert "ladder-residual: 4 of 4 layers" in lines
    sharing = "cross-layer-attention: 2 of 4 layers share keys and values (producers 0, 2)"
    assert sharing in lines
    assert f"{sharing}, kv norm of their own" in lines
    assert not any("ladder-residual" in log for log in recorded[2]["logs"][1:])


def test_optimizers_hold_what_the_converted_model_has(recorded):
    """However the script names the parameters, all of them train, the added ones too."""
    seen = recorded[1]["optimizers"]
    assert len(seen) == 14
    for name, moved in seen.items():
        assert any("kv_norm" in parameter for parameter in moved)
        assert all(moved.values()), name


def test_muon_trains_and_resumes(recorded):
    """To the bit as on a model that was converted before; all parameters, on two ranks."""
    assert recorded[2]["muon"].keys() >= {"ZeRO 1"}
    for name, seen in recorded[2]["muon"].items():
        assert seen == {"as before": True, "moved": True, "resumed": True}, name


def test_engines_without_an_optimizer_are_left_alone(recorded):
    """Such as reference models; the JSON can say otherwise."""
    assert recorded[1]["left alone"] == {
        "trained": "LlamaForCausalLM",
        "all": "PluginDecoderForCausalLM",
    }
    assert "ladder-residual: left alone, an engine without an optimizer" in recorded[1]["logs"][0]


def test_a_second_engine_finds_its_model_converted(recorded):
    assert recorded[1]["again"]["same"]
    assert recorded[1]["again"]["losses"] < 1e-5


def test_weights_that_zero_init_partitioned_are_converted_in_their_place(recorded):
    """``from_pretrained`` under ZeRO 3 on two ranks: no rank ever has a whole weight."""
    assert recorded[2]["partitioned"]["shapes"] == [[0]]
    assert recorded[2]["partitioned"]["losses"] < 1e-5


def test_universal_checkpoints_carry_the_features(recorded):
    assert recorded[2]["universal"]["record"]
    assert recorded[2]["universal"]["parameters"] < 1e-6


def test_weights_of_one_function_do_not_run_as_another(recorded):
    found, log = recorded[1]["other functions"], recorded[1]["logs"][0]
    assert "this run's model no feature: its weights would compute another" in found["lost"]
    assert 'model {"ladder_residual": {"layers": "0"}}: its weights' in found["changed"]
    assert 'standard has no feature, this run\'s model {"ladder_residual"' in log
    assert "this run's model no feature: another function until retrained" in log


REFUSED = {
    "unknown": "unknown key 'laddr_residual'; did you mean 'ladder_residual'?",
    "field": "ladder_residual: unknown key 'layer'; did you mean 'layers'?",
    "auto": 'deepspeed_plugins.ladder_residual.layers "auto"',
    "shape": "deepspeed_plugins.ladder_residual True: must be an object",
    "empty": "names no feature",
    "apply_to": "deepspeed_plugins.apply_to 'train': unknown; did you mean 'trained'?",
    "kv_init": "deepspeed_plugins.kv_init: goes with cross_layer_attention only",
    "none": "layers 'none' has no ladder layer: name at least one of 0 to 3",
    "factor": "cross_layer_attention.sharing_factor (--cla-sharing-factor) 5: the model has 4",
    "ranks": "deepspeed_plugins.desync_residual.ranks: missing; give the number",
    "rank heads": "desync_residual.ranks 4: must divide num_key_value_heads 2",
    "pattern": "'00,01,00,01,00': names 5 layers, the model has 4",
    "model": "torch.nn.modules.linear.Linear cannot be converted; known are",
    "pipeline": "a PipelineModule is cut into stages",
}


def test_refused_by_name(recorded):
    assert recorded[1]["refused"].keys() == REFUSED.keys()
    for name, message in REFUSED.items():
        assert message in recorded[1]["refused"][name]
    tensor_parallel = {
        "preset": "tensor_parallel.preset_model 'llama' is in the way",
        "plan": "drop partition_config",
        "heads": "use autotp_size 1 at most",
        "adapters": "AutoTP would leave the weights under PEFT's adapters whole",
    }
    old = versions.installed() < versions.AUTOTP_OLDEST
    desync = recorded[2]["refused"]["desync"]
    assert "desync_residual with tensor_parallel.autotp_size 2: each process computes" in desync
    for name, message in tensor_parallel.items():
        seen = recorded[2]["refused"][name]
        assert "ladder_residual with tensor_parallel.autotp_size 2: " in seen
        assert ("was not tested with it" if old else message) in seen


def test_the_section_gives_the_features_of_megatrons_flags():
    section = {"ladder_residual": {"layers": "last:2"}, "cross_layer_attention": {}}
    assert features_of({"deepspeed_plugins": section}) == {
        "ladder_residual": LadderResidual("last:2"),
        "cross_layer_attention": CrossLayerAttention(),
    }
    assert features_of({}) == {}
    with pytest.raises(ConfigError, match="must be an object, one key per feature"):
        features_of({"deepspeed_plugins": ["ladder_residual"]})


def test_an_added_parameter_joins_the_group_of_its_like():
    norm, gone, other, added, second = (nn.Parameter(torch.ones(2)) for _ in range(5))
    both, likes = {"n": added, "m": second}, {"n": norm, "m": norm}
    conversion = Conversion(None, removed={"k": gone}, added=both, likes=likes)
    optimizer = torch.optim.SGD([{"params": [gone, other]}, {"params": [norm], "lr": 0.5}], lr=1)
    optimizer.state[gone]["momentum_buffer"] = torch.ones(2)
    held = [other, norm, gone]
    arguments = {"optimizer": optimizer, "model_parameters": held}
    follow(conversion, arguments)
    follow(conversion, arguments)
    assert held == [other, norm, added, second]
    assert [group["params"] for group in optimizer.param_groups] == [[other], held[1:]]
    assert gone not in optimizer.state
    arguments = {"model_parameters": ({"params": (p,)} for p in (gone, other))}
    follow(conversion, arguments)
    assert arguments["model_parameters"] == [{"params": []}, {"params": [other]}]


def test_trainer_that_only_gets_the_json(tmp_path):
    """Trains, saves, resumes; what it saved loads as the decoder and has the loss it had."""
    record = tmp_path / "record"
    launch(CASES.with_name("trainer_cases.py"), record, tmp_path, processes=1, timeout=300)
    data = Pieces().data
    for name, seen in json.loads(record.read_text()).items():
        assert seen["class"] == "PluginDecoderForCausalLM", name
        trained, resumed = seen["losses"]
        assert resumed == trained, name
        for folder in ("saved", "checkpoint-4"):
            model, report = AutoModelForCausalLM.from_pretrained(
                Path(seen["folder"]) / folder, output_loading_info=True
            )
            assert type(model) is PluginDecoderForCausalLM
            assert not any(report.values())
            assert model.config.kv_producers == (0, 0, 2, 2)
            assert model.config.ladder_layers == (1, 2, 3)
            found = model(data, labels=data).loss.item()
            assert found == pytest.approx(trained, rel=1e-5), (name, folder)


@pytest.mark.parametrize("stage", [0, 2, "partitioned"])
def test_an_export_computes_what_the_engine_computed(recorded, tmp_path, stage, capsys):
    """ZeRO 0, 2 and, from partitioned weights, 3, on two ranks; as a user loads it."""
    folder = recorded[2]["folder"]
    assert export_hf.main([str(folder / f"both-{stage}"), str(tmp_path / "out")]) == 0
    assert "as plugin_decoder" in capsys.readouterr().out
    kept = torch.load(folder / f"logits-{stage}.pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model) is PluginDecoderForCausalLM
    torch.testing.assert_close(model(kept["ids"]).logits, kept["logits"], rtol=1e-5, atol=1e-5)


def test_exports_are_refused_by_name(recorded, tmp_path, capsys):
    folder = recorded[1]["folder"]

    def said(*arguments):
        assert export_hf.main([*map(str, arguments), str(tmp_path / "out")]) == 2
        assert list(tmp_path.glob("out")) == []
        return capsys.readouterr().err

    assert "a stock model is exported by DeepSpeed's zero_to_fp32.py" in said(folder / "standard")
    assert "no file 'latest'" in said(tmp_path)
    assert "no such checkpoint" in said("--tag", "none", folder / "ladder-1")
    shutil.copytree(folder / "ladder-1" / "half", tmp_path / "bad")
    (tmp_path / "bad" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(
        pickle.dumps(Path("evil"))
    )
    assert "refused, it holds more than tensors" in said(tmp_path / "bad")
