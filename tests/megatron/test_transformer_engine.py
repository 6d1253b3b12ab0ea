"""Ladder layers of TransformerEngine's spec, built without a GPU; their forward is not run here.

``make test`` unpacks TransformerEngine's wheels into ``.matrix/transformer-engine``, outside the
environment: installed there it would change which classes Megatron picks everywhere else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.megatron.harness import launch

ROOT = Path(__file__).parents[2]
WHEELS = Path(os.environ.get("TRANSFORMER_ENGINE", ROOT / ".matrix" / "transformer-engine"))


@pytest.mark.skipif(
    not (WHEELS / "transformer_engine").is_dir(),
    reason="no TransformerEngine wheels: `make transformer-engine` unpacks them",
)
def test_ladder_layers_of_transformer_engine(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    script = Path(__file__).with_name("te_layers.py")
    environment = {"PYTHONPATH": f"{WHEELS}:{ROOT}", "MEGATRON_PLUGINS_CPU": "1"}
    launch(script, output, processes=2, environment=environment)
    found = json.loads(output.read_text())
    assert found["classes"] == ["TERowParallelLinear"]
    # Only the last MLP keeps its own reduction: nothing runs after it that could hide one.
    assert found["parallel modes"] == [[None, None], [None, "row"]]
    assert found["stock parallel mode"] == "row"
    assert found["multipliers"] == [0.5] * 4  # of both additions, inside the ladder's
    assert found["same shapes"]
    assert found["same keys"]
    assert found["same shards"]
