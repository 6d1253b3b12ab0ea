"""What every host's ``doctor`` says: its ledger against the installed package, and how it is armed.

Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch_plugins.seams import patch
from torch_plugins.seams.symbol import Symbol

OURS = ("torch_plugins", "megatron_plugins", "deepspeed_plugins")


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions as their metadata has them."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def native_operators() -> dict[str, str]:
    """The libraries of ``csrc/``, each with its state."""
    try:
        from torch_plugins import native
    except ImportError as error:
        return {"cpu": f"none: {error}"}
    return native.load()


def activation(package: str, variables: Iterable[str]) -> dict[str, str]:
    """How this environment arms ``package``; ``variables`` are shown where they are set."""
    names = [point.name for point in importlib.metadata.entry_points(group="torch.backends")]
    missing = f"missing: use python -m {package} SCRIPT"
    report = {"entry point": "found" if package in names else missing}
    return report | {name: os.environ[name] for name in variables if name in os.environ}


def examine(symbol: Symbol, disabled: bool) -> dict[str, Any]:
    """One ledger row with its state: hooked, found (there, not ours to wrap or plugins disabled) or
    missing, and who else wrapped it."""
    state, at, wrapped_by, error = "missing", symbol.targets[0], [], None
    for target in symbol.targets:
        module_name, _, attribute = target.partition(":")
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(sys.__stderr__),  # some modules ask for its descriptor
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except Exception as problem:
            error = repr(problem)
            continue
        owner, name = patch.find(module, attribute)
        if owner is not None:
            state, at, wrapped_by = "found", target, others(getattr(owner, name), module_name)
            break
    if symbol.handler and state == "found" and not disabled:
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
    """Modules, other than ours and those of the package that ``home`` is in, which has decorators
    of its own, that wrapped or replaced an upstream function."""
    found = []
    known = (*OURS, home.partition(".")[0])
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", home)
        if module.partition(".")[0] not in known:
            found.append(module)
        function = getattr(function, "__wrapped__", None)
    return found


def healthy(hooks: Iterable[dict[str, Any]]) -> bool:
    return all(hook["state"] in ("hooked", "found") for hook in hooks)


def table(title: str, values: dict[str, str]) -> list[str]:
    """Lines of names and values."""
    return [title, *(f"  {name:<20} {value}" for name, value in values.items())]


def rows(title: str, symbols: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of examined ledger rows."""
    lines = [title]
    for row in symbols:
        lines.append(f"  {row['state']:<8} {row['id']:<20} {row['target']}")
        lines.append(f"  {'':<8} {'':<20} {row['versions']}: {row['why']}")
        if row["wrapped_by"]:
            lines.append(f"  conflict {'':<20} also wrapped by {', '.join(row['wrapped_by'])}")
        if row["state"] == "missing" and row["error"]:
            lines.append(f"  error    {'':<20} {row['error']}")
    return lines
