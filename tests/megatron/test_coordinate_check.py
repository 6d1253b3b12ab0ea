"""The coordinate check of the example, on few widths and steps: real Megatron, real Adam."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "power_lr" / "coordinate_check.py"


def test_activations_do_not_grow_with_the_width_under_mup(tmp_path: Path) -> None:
    """They do where nothing is scaled; and the picture is drawn."""
    picture = tmp_path / "check.png"
    widths = ("--widths", "64", "128", "256")
    done = subprocess.run(
        [sys.executable, SCRIPT, *widths, "--steps", "3", "--output", picture],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = {line[0]: [float(word) for word in line[1:]] for line in lines[-3:-1]}
    assert min(rows["standard"]) > 0.7
    attention, mlp, residual, logits = map(abs, rows["muP"])
    assert max(attention, mlp) < 0.25
    assert residual < 0.05
    assert logits < 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")
