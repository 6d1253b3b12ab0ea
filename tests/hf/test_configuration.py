"""The configuration: validation, round trip, parallel plans."""

import json

import pytest
from transformers import AutoConfig

from torch_plugins.config import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ladder_residual": {"layer": "all"}}, "did you mean 'layers'"),
        ({"ladder_residual": {"layers": "9"}}, "layers 0 to 3"),
        ({"ladder_residual": True}, "ladder_residual True: use a dict"),
        ({"ladder_residuals": {"layers": "all"}}, "did you mean 'ladder_residual'"),
        ({"cross_layer_attention": {"factor": 2}}, "unknown key 'factor'"),
        ({"cross_layer_attention": {"sharing_factor": 5}}, "the model has 4 layers"),
        ({"cross_layer_attention": {"pattern": "0,0,1,1"}}, "layer 2 must be its own producer"),
        ({"cross_layer_attentoin": {}}, "did you mean 'cross_layer_attention'"),
        ({"dense_moe": {"num_expert": 4, "gated": True}}, "did you mean 'num_experts'"),
        ({"dense_moe": {"num_experts": 3, "gated": True}}, "intermediate_size 40: .*num_experts 3"),
        (
            {"dense_moe": {"num_experts": 4, "ffn_hidden_size": 8, "gated": True}},
            "intermediate_size 40: .* set intermediate_size 32",
        ),
        ({"dense_moe": {"num_experts": 4}}, "mlp_gated True: dense_moe.gated is False"),
        ({"dense_moe": {"num_experts": 4, "gated": True}, "mlp_bias": True}, "mlp_bias True"),
        ({"dense_moe": {"attention_experts": 4}}, "num_attention_heads 4: .* are 8 heads"),
        (
            {"dense_moe": {"attention_experts": 2}, "attention_bias": True},
            "attention_output_bias True: .*set false",
        ),
        ({"dense_moe": {"num_experts": 4, "inference": "top-k"}}, "needs dense_moe.top_k"),
        ({"dense_mo": {}}, "did you mean 'dense_moe'"),
        ({"normalization": "RMSNorm"}, "normalization 'RMSNorm'"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "swish2"}, "hidden_act 'swish2'"),
        ({"hidden_size": 26}, "set head_dim"),
        ({"head_dim": 12, "rope_parameters": {"partial_rotary_factor": 0.25}}, "must be even"),
    ],
)
def test_a_wrong_field_is_an_error_with_its_name_and_remedy(make_config, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**fields)


def test_override_at_load_is_validated(make_config, make_model, tmp_path):
    make_config(ladder_residual={"layers": "all"}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, ladder_residual={"layers": "last:1"})
    assert config.ladder_layers == (3,)
    with pytest.raises(ConfigError, match="did you mean"):
        _ = AutoConfig.from_pretrained(tmp_path, ladder_residual={"layes": "1"}).ladder_layers


def test_round_trip(make_config, tmp_path):
    config = make_config(
        ladder_residual={"layers": "1-2"},
        cross_layer_attention={"pattern": "0,1,1,3", "kv_norm": "separate"},
        qk_norm=True,
        head_dim=12,
        rope_parameters={"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        attention_bias=True,
        attention_output_bias=False,
        tie_word_embeddings=True,
        eos_token_id=[3, 4],
        dense_moe={"num_experts": 4, "gated": True, "inference": "top-k", "top_k": 2},
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["ladder_residual"] == {"layers": "1-2"}
    assert written["cross_layer_attention"] == {"pattern": "0,1,1,3", "kv_norm": "separate"}
    assert written["dense_moe"] == config.dense_moe
    assert again.kv_producers == (0, 1, 1, 3)
    assert again.experts == config.experts
    assert again.experts.kept() == (2, None)
    assert written["model_type"] == "plugin_decoder"
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_pipeline_plan_only_where_one_tensor_is_the_state(make_config):
    assert make_config().base_model_pp_plan is not None
    assert make_config(ladder_residual={"layers": "none"}).base_model_pp_plan is not None
    assert make_config(ladder_residual={"layers": "last:1"}).base_model_pp_plan is None
    assert make_config(cross_layer_attention={"sharing_factor": 2}).base_model_pp_plan is None
    assert make_config(cross_layer_attention={"sharing_factor": 1}).base_model_pp_plan is not None
    assert make_config(dense_moe={"attention_experts": 2}).base_model_pp_plan is not None
    assert make_config(embedding_multiplier=2.0).base_model_pp_plan is None
    assert make_config(position_embedding_type="learned_absolute").base_model_pp_plan is None


def test_a_pipeline_stage_of_a_ladder_model_is_refused(make_model, tokens):
    pipeline = pytest.importorskip("transformers.distributed.pipeline_parallel")
    model = make_model(ladder_residual={"layers": "all"})
    model.model.layers[0] = pipeline.PipelineIdentityLayer()
    with pytest.raises(ConfigError, match="pipeline parallelism"):
        model(tokens())


def test_tensor_plan_names_every_projection(make_model):
    for gated in (True, False):
        model = make_model(mlp_gated=gated)
        linears = {n.replace("layers.0", "layers.*") for n, _ in model.named_modules()}
        plan = {name for name in model.tp_plan if "layers" in name}
        assert plan == {n for n in linears if n.endswith("_proj") and "layers.*" in n}
    assert make_model(dense_moe={"attention_experts": 2}).tp_plan == {}
