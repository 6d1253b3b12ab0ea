"""The ledgers against the installed DeepSpeed, transformers and accelerate; versions; doctor."""

import ast
import inspect
import json
import sys
from pathlib import Path

import pytest

import deepspeed_plugins
from deepspeed_plugins import auxiliary_loss, doctor
from deepspeed_plugins.features import adapter, available
from deepspeed_plugins.seams import requirements, versions
from deepspeed_plugins.seams.ledger import HOOKS, REGISTRIES, USED
from torch_plugins import native
from torch_plugins.config import FEATURES, ConfigError
from torch_plugins.seams import huggingface, patch, report
from torch_plugins.seams.symbol import Symbol

PACKAGE = Path(deepspeed_plugins.__file__).parent


@pytest.mark.parametrize("symbol", [*HOOKS, *USED, *huggingface.HOOKS], ids=lambda row: row.id)
def test_ledger_matches_what_is_installed(symbol):
    row = report.examine(symbol, disabled=False)
    assert row["state"] == ("hooked" if symbol.handler else "found"), row
    assert not row["wrapped_by"]
    module_name, _, attribute = row["target"].partition(":")
    owner, name = patch.find(sys.modules[module_name], attribute)
    if symbol.relies_on:
        source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
        assert [word for word in symbol.relies_on if word not in source] == []


def test_ledger_ids_are_unique_and_features_exist():
    ids = [symbol.id for symbol in (*HOOKS, *USED, *huggingface.HOOKS)]
    assert len(ids) == len(set(ids))
    keys = {"any", auxiliary_loss.KEY, *(feature.key() for feature in FEATURES)}
    assert {symbol.feature for symbol in (*HOOKS, *USED)} <= keys
    assert {mark for _, mark, _ in (*REGISTRIES, *huggingface.REGISTRIES)}.isdisjoint(patch.failed)


def test_every_adapter_keeps_the_contract():
    assert "power_lr" in available()
    for key in available():
        assert callable(adapter(key).describe)


def test_no_symbol_of_deepspeed_is_spelled_outside_seams():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "seams":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                dotted = node.value.startswith("deepspeed.")
                assert not dotted or " " in node.value, f"{path.name}: {node.value}"


def test_window():
    assert versions.verdict((0, 18, 6)) is None
    assert versions.verdict((0, 19, 99)) is None
    assert "older than the supported" in versions.verdict((0, 18, 5))
    assert "newer than the tested" in versions.verdict((0, 20, 0))
    assert "not installed" in versions.verdict(None)
    assert versions.verdict(versions.installed()) is None


def test_versions_outside_the_window(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: (0, 18, 5))
    with pytest.raises(ConfigError, match=r"power-lr: deepspeed 0.18.5 is older"):
        requirements.require("power_lr", "power-lr")
    monkeypatch.setattr(versions, "installed", lambda: (0, 20, 0))
    with pytest.warns(UserWarning, match=r"power-lr: deepspeed 0.20.0 is newer"):
        requirements.require("power_lr", "power-lr")


LOST = Symbol(
    "lost",
    ("deepspeed.runtime.engine:DeepSpeedEngine.gone",),
    "power_lr",
    "why",
    "when",
    handler="deepspeed_plugins.power_lr:follow_batch",
)


def test_a_missing_method_is_an_error_of_its_feature(monkeypatch):
    monkeypatch.setattr(requirements, "HOOKS", (LOST,))
    requirements.require("ladder_residual", "ladder-residual")
    with pytest.raises(ConfigError, match=r"power-lr needs .*DeepSpeedEngine.gone .*missing in"):
        requirements.require("power_lr", "power-lr")


def test_doctor(monkeypatch, capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in (*found["hooks"], *found["trainer"])} == {"hooked"}
    assert found["activation"]["entry point"] == "found"
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert f"cpu                  {native.load()['cpu']}" in text
    for symbol in (*HOOKS, *USED, *huggingface.HOOKS):
        assert symbol.id in text
    assert text.endswith("healthy\n")
    monkeypatch.setattr(doctor, "HOOKS", (LOST,))
    assert doctor.main([]) == 1
    assert "missing  lost" in capsys.readouterr().out
