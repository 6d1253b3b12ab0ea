"""A feature is one function in both hosts: Megatron's own training on two tensor-parallel ranks,
and a stock model of transformers with a section of DeepSpeed's JSON, on two data-parallel ranks and
ZeRO 3.

Weights and gradients go from the one to the other under the exporter's names. Batches, optimizer
and clipping are the same; DeepSpeed is given two sequences on each rank, one at a time, Megatron
four, two at a time, the same two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_plugins.export.mapping import HFTensors
from tests.megatron.harness import launch, train
from tests.parity.conftest import Case
from tests.parity.deepspeed_table import BATCH, CASES, RATE, SEQUENCE, SIZES, STEPS, WRONG

HERE = Path(__file__).parent
LIMITS = {"names": 0, "loss": 1e-5, "norm": 1e-5, "rates": 1e-12, "gradients": 1e-5}
"""Relative differences, of a gradient to its largest element. Measured: 2e-7, 1e-6, 0, 3e-6."""
LIMITS["weights"] = RATE / 500
"""After two steps; measured: 2e-6. A step of Adam moves a weight by about the rate."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each host recorded, by case, in one form."""
    folder = tmp_path_factory.mktemp("hosts")
    generator = torch.Generator().manual_seed(0)
    size = (STEPS, BATCH, SEQUENCE + 1)
    batches = torch.randint(SIZES["vocab_size"], size, generator=generator)
    torch.save(batches, folder / "batches.pt")
    environment = {"BATCHES": str(folder / "batches.pt")}
    script = HERE / "megatron_steps.py"
    train("--save", folder, processes=2, script=script, environment=environment)
    megatron = {}
    for name, steps in json.loads((folder / "record.json").read_text()).items():
        torch.save(tensors(folder / name, 1), folder / f"{name}.pt")
        kept = {key: [step[key] for step in steps] for key in ("loss", "norm", "rates")}
        found = {"gradients": tensors(folder / name, 2), "weights": tensors(folder / name, 3)}
        megatron[name] = kept | found
    environment = {"PYTHONPATH": str(HERE.parents[1]), "TORCHDYNAMO_DISABLE": "1"}
    script = HERE / "deepspeed_steps.py"
    launch(script, folder, processes=2, environment=environment, timeout=300)
    return {"megatron": megatron, "deepspeed": torch.load(folder / "deepspeed.pt")}


def tensors(load: Path, iteration: int) -> dict[str, Tensor]:
    """A checkpoint of megatron_steps.py under Hugging Face names."""
    case = Case.open(load / f"iter_{iteration:07d}")
    found = HFTensors(case.checkpoint, case.config)
    return {name: found[name] for name in found}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far two records are apart, in each of :data:`LIMITS`; over the steps that both have."""

    def relative(ones: list[float], others: list[float]) -> float:
        same = len(ones) == len(others)
        pairs = zip(ones, others, strict=True) if same else [(1.0, 2.0)]
        return max(abs(one - other) / abs(other) for one, other in pairs)

    def largest(key: str, scale: bool) -> float:
        pairs = [(ours[key][n], theirs[key][n]) for n in ours[key].keys() & theirs[key].keys()]
        return max(((a - b).abs().max() / (b.abs().max() if scale else 1)).item() for a, b in pairs)

    steps = min(len(ours["loss"]), len(theirs["loss"]))
    rates = zip(ours["rates"][:steps], theirs["rates"][:steps], strict=True)
    return {
        "names": len(ours["gradients"].keys() ^ theirs["gradients"].keys()),
        "loss": relative(ours["loss"][:steps], theirs["loss"][:steps]),
        "norm": relative(ours["norm"][:steps], theirs["norm"][:steps]),
        "rates": max(relative(one, other) for one, other in rates),
        "gradients": largest("gradients", scale=True),
        "weights": largest("weights", scale=False),
    }


@pytest.mark.parametrize("name", CASES)
def test_both_hosts_train_alike(hosts: dict[str, Any], name: str) -> None:
    """Loss, gradient norm and rates of every step, every gradient, every weight afterwards."""
    megatron, deepspeed = hosts["megatron"][name], hosts["deepspeed"][name]
    assert len(megatron["loss"]) == len(deepspeed["loss"]) == CASES[name].steps
    apart = differences(deepspeed, megatron)
    assert {key: apart[key] for key in LIMITS if not apart[key] <= LIMITS[key]} == {}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_on_one_side_shows(hosts: dict[str, Any], name: str) -> None:
    """And shows by far, where it should."""
    case, key, _ = WRONG[name]
    apart = differences(hosts["deepspeed"][name], hosts["megatron"][case])
    assert apart[key] > 50 * LIMITS[key]


def test_a_rate_rises_holds_and_falls(hosts: dict[str, Any]) -> None:
    """The trainings with Power LR pass through all of its phases."""
    rates = [step[-1] for step in hosts["deepspeed"]["power lr"]["rates"]]
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[4] > rates[5]
    assert hosts["deepspeed"]["together"]["rates"] == [[rate / 4, rate] for rate in rates]
