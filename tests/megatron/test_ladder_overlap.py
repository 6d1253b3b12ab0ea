"""What a ladder hides changes no result, and a rank that fails is told of by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import LAYERS, launch

HERE = Path(__file__).parent
NAMES = [
    f"{kind}{layout}"
    for kind in ("gpt", "llama", "partial", "recompute", "two-microbatches", "frozen")
    for layout in ("", "-sequence-parallel")
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Any]]]:
    """Results of ladder_exact.py, by the number of tensor-parallel processes."""
    folder, results = tmp_path_factory.mktemp("exact"), {}
    for size in (1, 2, 4):
        script = HERE / "ladder_exact.py"
        launch(script, folder, processes=size, environment=LAYERS, timeout=200)
        if size > 1:
            lines = map(json.loads, (folder / f"tp{size}.jsonl").read_text().splitlines())
            results[size] = {line.pop("case"): line for line in lines}
    return results


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_all_gradients_are_those_of_one_process(cases: Any, name: str, size: int) -> None:
    case = cases[size][name]
    assert case["worst"] <= 1e-12
    assert case["missing"] == 0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_hiding_collectives_changes_no_bit(cases: Any, name: str, size: int) -> None:
    assert cases[size][name]["bitwise"]


@pytest.mark.parametrize(
    ("how", "where", "layout", "named"),
    [
        ("dies", "forward", "plain", ("layer 2, attention: ", "layer 2, mlp: ")),
        ("dies", "backward", "sp", ("layer 1, ", "layer 2, ", "layer 3, attention, ")),
        ("sleeps", "backward", "plain", ("layer 2, mlp, gradient of its input: ",)),
    ],
)
def test_a_rank_that_fails_is_no_hang(
    how: str, where: str, layout: str, named: tuple[str, ...]
) -> None:
    """Rank 1 fails at the MLP of layer 2; rank 0, which is a module ahead or behind, says where it
    waited."""
    script = HERE / "ladder_fault.py"
    _, outputs = launch(
        script, how, where, layout, processes=2, environment=LAYERS, check=False, timeout=60
    )
    assert "tensor-parallel communication failed; if another rank ended" in outputs[0]
    assert any(f"error: {name}" in outputs[0] for name in named)
