"""Plugin layers of TransformerEngine's spec, without a GPU: its Python half is the real one, and of
its compiled half there is what te_compiled.py computes in torch.

``make test`` unpacks TransformerEngine's wheels into ``.matrix/transformer-engine``, outside the
environment: installed there it would change which classes Megatron picks everywhere else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import LAYERS, launch
from tests.megatron.ladder_order import (
    assert_gradients_are_hidden,
    assert_modules_begin_under_the_one_before,
)

ROOT = Path(__file__).parents[2]
WHEELS = Path(os.environ.get("TRANSFORMER_ENGINE", ROOT / ".matrix" / "transformer-engine"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of te_ladder.py."""
    if not (WHEELS / "transformer_engine").is_dir():
        pytest.skip("no TransformerEngine wheels: `make transformer-engine` unpacks them")
    output = tmp_path_factory.mktemp("te") / "cases.jsonl"
    script = Path(__file__).with_name("te_ladder.py")
    environment = {**LAYERS, "PYTHONPATH": f"{WHEELS}:{ROOT}", "MEGATRON_PLUGINS_CPU": "1"}
    launch(script, output, processes=2, environment=environment, timeout=200)
    return {line.pop("case"): line for line in map(json.loads, output.read_text().splitlines())}


@pytest.fixture
def found(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What te_layers.py built."""
    return cases["layers"]


LAYOUTS = pytest.mark.parametrize("layout", ["", "-sequence-parallel"])


@pytest.mark.parametrize(
    "name",
    ["all", "llama", "sequence-parallel", "llama-sequence-parallel", "bf16", "recompute"],
)
def test_a_ladder_is_the_recurrence(cases: dict[str, Any], name: str) -> None:
    """Written out with the modules of a stock model, whose linears contain the norms."""
    case = cases[name]
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["from standard"] >= 5e-3
    assert case["same keys"]
    assert case["same sharded keys"]


@LAYOUTS
def test_a_ladder_is_that_of_megatrons_own_layers(cases: dict[str, Any], layout: str) -> None:
    case = cases[f"local{layout}"]
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6


@LAYOUTS
def test_desync_is_that_of_megatrons_own_layers(cases: dict[str, Any], layout: str) -> None:
    case = cases[f"desync{layout}"]
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["same shards"]


def test_every_gradients_reduction_overlaps_the_module_before(cases: dict[str, Any]) -> None:
    assert_gradients_are_hidden(cases["order"]["backward"])


def test_a_sequence_parallel_module_begins_under_the_one_before(cases: dict[str, Any]) -> None:
    case = cases["order-sequence-parallel"]
    assert_modules_begin_under_the_one_before(case["forward"], case["backward"])


@pytest.mark.parametrize("layout", ["", "-sequence-parallel", "-recompute-sequence-parallel"])
def test_hiding_adds_no_collective(cases: dict[str, Any], layout: str) -> None:
    case = cases[f"collectives{layout}"]
    assert case["ladder"] == case["standard"]
    assert sum(case["ladder"].values()) > 16


@LAYOUTS
def test_a_buffer_in_flight_is_never_read(cases: dict[str, Any], layout: str) -> None:
    """The buffers hold NaN until the wait, and NaN is not <= 0."""
    assert cases[f"late{layout}"]["logits"] <= 0
    assert cases[f"late{layout}"]["gradients"] <= 0


@LAYOUTS
@pytest.mark.parametrize(
    "kind", ["", "-bf16", "-recompute", "-recompute-mlp", "-frozen", "-shared", "-quantized"]
)
def test_hiding_changes_nothing(cases: dict[str, Any], kind: str, layout: str) -> None:
    """Layers 1 to 3 and the MLP before them, one norm each; the second producer of keys and values
    has one more. Its three gradients of one input are added up in another order."""
    case = cases[f"hiding{kind}{layout}"]
    assert case["bitwise"] or (kind == "-shared" and case["difference"] <= 1e-5)
    assert case["gradients"] > 20
    assert case["apart"] == {"-shared": 8, "-quantized": 0}.get(kind, 7)
    assert case["same parameters"]
    assert case["same keys"]
    assert case["same shards"]


def test_a_norm_waits_for_its_weights(cases: dict[str, Any]) -> None:
    """It runs ahead of the linear in whose call they are waited for else."""
    assert cases["weights-arrive-late"]["logits"] <= 0


def test_linears_in_eight_bits_stay_as_they_are(cases: dict[str, Any]) -> None:
    case = cases["eight-bits"]
    assert case["classes"] == ["megatron.core.extensions.transformer_engine"] * 2
    assert case["entrances"] == 0


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


def test_layers_of_a_hybrid_stack_that_share(found: dict[str, Any]) -> None:
    shards = found["hybrid"]["sharing"]
    assert shards == found["hybrid"]["sharing, local layers"]
    keys = [key for key in shards if "linear_kv" in key]
    assert sorted({key.split(".")[2] for key in keys}) == ["0"]
    assert len(keys) == 3
    assert shards["decoder.layers.2.self_attention.linear_qkv.weight"] == [16, 32]


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
