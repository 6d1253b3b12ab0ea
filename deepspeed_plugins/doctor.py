"""``python -m deepspeed_plugins.doctor [--json]``: what is installed, and what the plugins found.

Exit code 1 when a hook is missing in the installed DeepSpeed, or DeepSpeed itself is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from typing import Any

import deepspeed_plugins
import torch_plugins._autoload
from deepspeed_plugins import _autoload
from deepspeed_plugins.features import available
from deepspeed_plugins.seams import versions
from deepspeed_plugins.seams.ledger import HOOKS, USED
from torch_plugins.seams import huggingface, report

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft")
VARIABLES = (
    "DEEPSPEED_PLUGINS_DISABLE",
    "TORCH_PLUGINS_DISABLE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


def diagnose() -> dict[str, Any]:
    """The whole report, as plain data."""
    deepspeed_plugins.activate()
    torch_plugins._autoload.activate()
    core = versions.installed()
    problem = versions.verdict(core)
    hooks = [report.examine(symbol, _autoload.disabled()) for symbol in HOOKS]
    trainer = [
        report.examine(symbol, torch_plugins._autoload.disabled())
        for symbol in huggingface.HOOKS
        if importlib.util.find_spec(symbol.targets[0].partition(".")[0])
    ]
    return {
        "versions": {
            "python": platform.python_version(),
            "deepspeed": versions.text(core) + (f" - {problem}" if problem else ""),
            **report.package_versions(PACKAGES),
        },
        "activation": report.activation("deepspeed_plugins", VARIABLES),
        "features": {key: feature.where() for key, feature in available().items()},
        "native_ops": report.native_operators(),
        "hooks": hooks,
        "trainer": trainer,
        "symbols": [report.examine(symbol, _autoload.disabled()) for symbol in USED],
        "healthy": report.healthy([*hooks, *trainer]),
    }


def render(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = []
    for title in ("versions", "activation", "features"):
        lines += report.table(title, found[title])
    lines += report.table("native operators (csrc/)", found["native_ops"])
    lines += report.rows("hooks (seams/ledger.py)", found["hooks"])
    lines += report.rows("symbols (seams/ledger.py)", found["symbols"])
    lines += report.rows("Hugging Face (torch_plugins/seams/huggingface.py)", found["trainer"])
    lines += ["healthy" if found["healthy"] else "NOT healthy: see the missing hooks above"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m deepspeed_plugins.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    options = parser.parse_args(argv)
    found = diagnose()
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0 if found["healthy"] else 1


if __name__ == "__main__":
    sys.exit(main())
