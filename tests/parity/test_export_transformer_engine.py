"""Checkpoints of the TransformerEngine spec, which fuses each norm into the linear behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_plugins.export.run import export
from tests.megatron.harness import train
from tests.megatron.test_transformer_engine import ROOT, WHEELS
from tests.parity.conftest import GQA, LLAMA, TP2

EXPERTS = "--dsmoe-gated --dsmoe-num-experts 4 --dsmoe-ffn-hidden-size 24 "
CASES = {
    "rmsnorm": LLAMA + TP2 + GQA,
    "layernorm": TP2,
    "w4a4": LLAMA + TP2 + GQA + "--w4a4",
    "experts": LLAMA + TP2 + EXPERTS + "--dsmoe-attention-experts 2",
}


@pytest.mark.skipif(
    not (WHEELS / "transformer_engine").is_dir(),
    reason="no TransformerEngine wheels: `make transformer-engine` unpacks them",
)
def test_checkpoints_of_transformer_engine(tmp_path: Path) -> None:
    """Saved from TransformerEngine's layers, compared with Megatron's local ones."""
    train(
        *("--save", tmp_path),
        processes=2,
        script=Path(__file__).with_name("save_checkpoints.py"),
        environment={
            "CASES": json.dumps({name: flags.split() for name, flags in CASES.items()}),
            "TRANSFORMER_ENGINE": "1",
            "PYTHONPATH": f"{WHEELS}:{ROOT}",
        },
    )
    for name in CASES:
        _, verdict = export(tmp_path / name, tmp_path / f"{name}-out")
        assert "Megatron-Core" in verdict.against
