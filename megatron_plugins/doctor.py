"""``python -m megatron_plugins.doctor [--json]``: what is installed, and what the plugins found.

Exit code 1 when a hook is missing in the installed Megatron, or Megatron itself is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_plugins import _autoload, cpu
from megatron_plugins.seams import versions
from megatron_plugins.seams.ledger import HOOKS, USED
from torch_plugins.seams import patch
from torch_plugins.seams.symbol import Symbol

PACKAGES = ("torch", "transformer-engine", "deepspeed", "transformers")


def diagnose() -> dict[str, Any]:
    """The whole report, as plain data."""
    hooks = [examine(symbol) for symbol in HOOKS]
    return {
        "versions": package_versions(),
        "activation": activation(),
        "hooks": hooks,
        "symbols": [examine(symbol) for symbol in USED],
        "native_ops": "none shipped in this version",
        "cpu_backend": {
            "on": cpu.installed(),
            "pieces": {piece.name: piece.reason for piece in cpu.PIECES},
        },
        "healthy": all(hook["state"] in ("hooked", "found") for hook in hooks),
    }


def package_versions() -> dict[str, str]:
    """Versions of everything that matters here; Megatron's is the one ``import`` gives."""
    found = {"python": platform.python_version()}
    core = versions.installed()
    found["megatron-core"] = f"{versions.text(core)}"
    problem = versions.verdict(core)
    if problem:
        found["megatron-core"] += f" - {problem}"
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["apex"] = apex()
    return found


def apex() -> str:
    """Which of the two packages called apex is installed: NVIDIA's, or PyPI's unrelated one."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    folders = spec.submodule_search_locations or []
    if any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders):
        return "NVIDIA apex; Megatron uses it where it chooses to"
    return "not NVIDIA's: an unrelated package of that name; remove it, pip uninstall apex"


def activation() -> dict[str, str]:
    """How this environment arms the plugins."""
    names = [point.name for point in importlib.metadata.entry_points(group="torch.backends")]
    found = "megatron_plugins" in names
    report = {"entry point": "found" if found else "missing: use python -m megatron_plugins SCRIPT"}
    for variable in ("MEGATRON_PLUGINS_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD", cpu.VARIABLE):
        if variable in os.environ:
            report[variable] = os.environ[variable]
    return report


def examine(symbol: Symbol) -> dict[str, Any]:
    """One ledger row with its state: hooked, found (there, not ours to wrap or plugins disabled) or
    missing, and who else wrapped it."""
    state, at, wrapped_by, error = "missing", symbol.targets[0], [], None
    for target in symbol.targets:
        module_name, _, attribute = target.partition(":")
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except Exception as problem:
            error = repr(problem)
            continue
        owner, name = patch.find(module, attribute)
        if owner is not None:
            state, at, wrapped_by = "found", target, others(getattr(owner, name), module_name)
            break
    if symbol.handler and state == "found" and not _autoload.disabled():
        state = patch.state(symbol) if symbol.id not in patch.failed else "missing"
    if symbol.id in patch.failed:
        error = repr(patch.failed[symbol.id])
    return {
        "id": symbol.id,
        "state": state,
        "target": at,
        "versions": symbol.versions,
        "feature": symbol.feature,
        "why": symbol.why,
        "remove_when": symbol.remove_when,
        "wrapped_by": wrapped_by,
        "error": error,
    }


def others(function: Any, home: str) -> list[str]:
    """Modules, other than ``home`` and ours, that wrapped or replaced an upstream function."""
    found = []
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", home)
        if module not in (home, patch.__name__) and not module.startswith("megatron_plugins."):
            found.append(module)
        function = getattr(function, "__wrapped__", None)
    return found


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = ["versions"]
    lines += [f"  {name:<20} {value}" for name, value in report["versions"].items()]
    lines += ["activation"]
    lines += [f"  {name:<20} {value}" for name, value in report["activation"].items()]
    for title in ("hooks", "symbols"):
        lines += [f"{title} (seams/ledger.py)"]
        for row in report[title]:
            lines.append(f"  {row['state']:<8} {row['id']:<20} {row['target']}")
            lines.append(f"  {'':<8} {'':<20} {row['versions']}: {row['why']}")
            if row["wrapped_by"]:
                lines.append(f"  conflict {'':<20} also wrapped by {', '.join(row['wrapped_by'])}")
            if row["state"] == "missing" and row["error"]:
                lines.append(f"  error    {'':<20} {row['error']}")
    lines += ["native ops", f"  {report['native_ops']}"]
    backend = report["cpu_backend"]
    lines += [f"CPU backend: {'on' if backend['on'] else 'off'}"]
    lines += [f"  {name:<20} {reason}" for name, reason in backend["pieces"].items()]
    lines += ["healthy" if report["healthy"] else "NOT healthy: see the missing hooks above"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m megatron_plugins.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    options = parser.parse_args(argv)
    report = diagnose()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["healthy"] else 1


if __name__ == "__main__":
    sys.exit(main())
