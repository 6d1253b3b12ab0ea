"""The report on the installed Megatron, and on environments that are not in order."""

import json
import sys

import pytest

from deepspeed_plugins.seams import ledger as deepspeed_ledger
from megatron_plugins import doctor
from megatron_plugins.seams.ledger import HOOKS, USED
from torch_plugins import native
from torch_plugins.seams import huggingface, patch
from torch_plugins.seams.symbol import Symbol


def test_healthy(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for symbol in (*HOOKS, *USED):
        assert symbol.id in text
        assert symbol.why in text
    assert "entry point          found" in text
    for kind, state in native.load().items():
        assert f"{kind:<20} {state}" in text
    assert text.endswith("healthy\n")


def test_json_says_the_same(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == doctor.diagnose()
    assert {row["state"] for row in report["hooks"]} == {"hooked"}
    assert report["cpu_backend"]["pieces"]


@pytest.mark.parametrize("target", ["megatron.core.utils:gone", "megatron.core.gone:anything"])
def test_missing_hook(monkeypatch, capsys, target):
    hook = Symbol(
        "lost", (target,), "any", "why", "when", handler="megatron_plugins.arguments:attach"
    )
    monkeypatch.setattr(doctor, "HOOKS", (hook,))
    assert doctor.main([]) == 1
    assert f"missing  lost                 {target}" in capsys.readouterr().out


def test_disabled(monkeypatch, capsys):
    """Nothing is hooked, on purpose: the report says why, and what would be hooked is there."""
    monkeypatch.setenv("MEGATRON_PLUGINS_DISABLE", "1")
    patch.undo_all()
    try:
        assert doctor.main(["--json"]) == 0
    finally:
        for hooks in (HOOKS, deepspeed_ledger.HOOKS, huggingface.HOOKS):  # all were undone
            patch.arm(hooks)
    report = json.loads(capsys.readouterr().out)
    assert report["activation"]["MEGATRON_PLUGINS_DISABLE"] == "1"
    assert {row["state"] for row in report["hooks"]} == {"found"}


def test_conflict_is_named(monkeypatch, capsys):
    from megatron.training import arguments

    foreign = {"__name__": "another_pack.patches", "ours": arguments.validate_args}
    exec("def validate_args(*args, **kwargs): return ours(*args, **kwargs)", foreign)
    foreign["validate_args"].__wrapped__ = arguments.validate_args
    monkeypatch.setattr(arguments, "validate_args", foreign["validate_args"])
    assert doctor.main([]) == 0
    assert "also wrapped by another_pack.patches" in capsys.readouterr().out
    del foreign["validate_args"].__wrapped__  # now ours cannot be seen below it
    assert doctor.main([]) == 1


@pytest.mark.parametrize(
    ("module", "verdict"),
    [("multi_tensor_apply", "NVIDIA apex"), ("auth", "not NVIDIA's: an unrelated package")],
)
def test_which_apex(tmp_path, monkeypatch, module, verdict):
    (tmp_path / "apex" / module).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.apex().startswith(verdict)
    assert "apex" not in sys.modules
