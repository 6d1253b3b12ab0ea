"""Plugin layers of TransformerEngine's spec, built without a GPU; their forward is not run here.

``make test`` unpacks TransformerEngine's wheels into ``.matrix/transformer-engine``, outside the
environment: installed there it would change which classes Megatron picks everywhere else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import launch

ROOT = Path(__file__).parents[2]
WHEELS = Path(os.environ.get("TRANSFORMER_ENGINE", ROOT / ".matrix" / "transformer-engine"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not (WHEELS / "transformer_engine").is_dir():
        pytest.skip("no TransformerEngine wheels: `make transformer-engine` unpacks them")
    output = tmp_path_factory.mktemp("te") / "found.json"
    script = Path(__file__).with_name("te_layers.py")
    environment = {"PYTHONPATH": f"{WHEELS}:{ROOT}", "MEGATRON_PLUGINS_CPU": "1"}
    launch(script, output, processes=2, environment=environment)
    loaded: dict[str, Any] = json.loads(output.read_text())
    return loaded


def test_ladder_layers(found: dict[str, Any]) -> None:
    assert found["classes"] == ["TERowParallelLinear"]
    # Only the last MLP keeps its own reduction: nothing runs after it that could hide one.
    assert found["parallel modes"] == [[None, None], [None, "row"]]
    assert found["stock parallel mode"] == "row"
    assert found["multipliers"] == [0.5] * 4  # of both additions, inside the ladder's
    assert found["same shapes"]
    assert found["same keys"]
    assert found["same shards"]


def test_ladder_layers_of_a_hybrid_stack(found: dict[str, Any]) -> None:
    """Layers 1 to 3 are a ladder: the outputs of layers 0 to 2 stay pending."""
    hybrid = found["hybrid"]
    layers = ["TransformerLayer", "MLPLayer", "TransformerLayer", "MoETransformerLayer"]
    assert [name.removeprefix("Ladder") for name in hybrid["classes"]] == [*layers, "MLPLayer"]
    assert [name.startswith("Ladder") for name in hybrid["classes"]] == [True] * 4 + [False]
    assert hybrid["parallel modes"] == [None, None, None, "row"]
    assert hybrid["same keys"]
    assert hybrid["same shards"]
    assert hybrid["shards"] == hybrid["shards, local layers"]
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in hybrid["shards"]


def test_layers_that_share_keys_and_values(found: dict[str, Any]) -> None:
    """Norms are within the linears here, and beside them in the local layers: one checkpoint fits
    both. 4 heads of 8 on two ranks; the consumer has queries only."""
    shards = found["sharing"]
    assert shards == found["sharing, local layers"]
    attention = {name: shards[f"decoder.layers.{name}"] for name in SHARES}
    assert attention == SHARES
    assert not [
        name for name in shards if name.startswith("decoder.layers.1.self_attention.linear_kv")
    ]


SHARES = {
    "0.self_attention.linear_qkv.weight": [16, 32],
    "0.self_attention.linear_kv.weight": [32, 32],
    "0.self_attention.linear_kv.layer_norm_weight": [32],
    "1.self_attention.linear_qkv.weight": [16, 32],
}


def test_layers_with_experts(found: dict[str, Any]) -> None:
    """A router reads what the norm gives: norms stand apart, those of attention under the fused
    linear's key, those of MLPs under a stock MoE layer's."""
    own, local = found["experts"], found["experts, local layers"]
    apart, fused = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    assert own == {name.replace(fused, apart): shape for name, shape in local.items()}
    layer = "decoder.layers.0."
    assert own[f"{layer}mlp.experts.experts.linear_fc1.weight"] == [2, 16, 32]
    assert own[f"{layer}self_attention.linear_qkv.layer_norm_weight"] == [32]
    assert own[f"{layer}self_attention.linear_kv.layer_norm_weight"] == [32]
    assert own[f"{layer}self_attention.router.hidden.weight"] == [8, 32]
    of_mlp = {name.replace(layer, "decoder.layers.") for name in own if layer in name}
    of_mlp = {name for name in of_mlp if ".mlp." in name or "pre_mlp" in name}
    stock = {name for name in found["stock experts"] if not name.endswith("_extra_state")}
    assert of_mlp - {"decoder.layers.mlp.router.hidden.weight"} == stock


def test_layers_that_quantize(found: dict[str, Any]) -> None:
    """Norms stand apart, under the keys of the fused linears; clips are all that is new."""
    case = found["quantized"]
    column, row = "TEColumnParallelLinear", "TERowParallelLinear"
    assert case["classes"] == {"qkv": column, "proj": row, "fc1": column, "fc2": row}
    assert case["columns"] == ["qkv", "fc1"]
    assert case["projections"] == [3, 1, 1, 1]
    assert case["reduced"] == ["proj", "fc2"]
    assert "IdentityOp" not in case["norms"]
    assert case["summed clips"] == [16, 16]
    clips = [key for key in case["keys"] if ".input_quantizer.clip_" in key]
    assert len(clips) == 16
    assert sorted({*case["keys"]} - {*clips}) == case["stock keys"]
