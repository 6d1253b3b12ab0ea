"""``python -m megatron_plugins.doctor [--json]``: what is installed, and what the plugins found.

Exit code 1 when a hook is missing in the installed Megatron, or Megatron itself is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

from megatron_plugins import _autoload, cpu
from megatron_plugins.seams import versions
from megatron_plugins.seams.ledger import HOOKS, USED
from torch_plugins.seams import report
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
        "native_ops": report.native_operators(),
        "cpu_backend": {
            "on": cpu.installed(),
            "pieces": {piece.name: piece.reason for piece in cpu.PIECES},
        },
        "healthy": report.healthy(hooks),
    }


def package_versions() -> dict[str, str]:
    """Versions of everything that matters here; Megatron's is the one ``import`` gives."""
    found = {"python": platform.python_version()}
    core = versions.installed()
    found["megatron-core"] = f"{versions.text(core)}"
    problem = versions.verdict(core)
    if problem:
        found["megatron-core"] += f" - {problem}"
    return found | report.package_versions(PACKAGES) | {"apex": apex()}


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
    variables = ("MEGATRON_PLUGINS_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD", cpu.VARIABLE)
    return report.activation("megatron_plugins", variables)


def examine(symbol: Symbol) -> dict[str, Any]:
    """One ledger row with its state; see :func:`torch_plugins.seams.report.examine`."""
    return report.examine(symbol, _autoload.disabled())


def render(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = report.table("versions", found["versions"])
    lines += report.table("activation", found["activation"])
    for title in ("hooks", "symbols"):
        lines += report.rows(f"{title} (seams/ledger.py)", found[title])
    lines += report.table("native operators (csrc/)", found["native_ops"])
    backend = found["cpu_backend"]
    lines += report.table(f"CPU backend: {'on' if backend['on'] else 'off'}", backend["pieces"])
    lines += ["healthy" if found["healthy"] else "NOT healthy: see the missing hooks above"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m megatron_plugins.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    options = parser.parse_args(argv)
    found = diagnose()
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0 if found["healthy"] else 1


if __name__ == "__main__":
    sys.exit(main())
