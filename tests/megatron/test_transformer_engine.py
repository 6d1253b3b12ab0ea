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
