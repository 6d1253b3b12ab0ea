"""Install a ledger's hooks as their modules are imported, and take them out again."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch_plugins.seams import watcher
from torch_plugins.seams.symbol import Symbol

_PATCH = "__torch_plugins_patch__"


@dataclass
class _Patch:
    mark: str
    owner: Any
    name: str
    original: Any
    replacement: Any
    live: bool = True


_applied: list[_Patch] = []
failed: dict[str, Exception] = {}
"""Hooks that could not be installed, by ledger id; an error only once a feature is on."""


def wrap(owner: Any, name: str, handler: Callable[..., Any], mark: str) -> None:
    """Replace ``owner.name`` by ``handler(original, *args, **kwargs)``.

    Idempotent per ``mark``; the replacement keeps ``__wrapped__`` and the original's metadata.
    """
    original = getattr(owner, name)
    if _is_ours(original, mark):
        return
    patch = _Patch(mark, owner, name, original, None)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not patch.live:  # undone, but somebody wrapped it since and still calls it
            return original(*args, **kwargs)
        return handler(original, *args, **kwargs)

    setattr(replacement, _PATCH, patch)
    patch.replacement = replacement
    setattr(owner, name, replacement)
    _applied.append(patch)


def undo_all() -> None:
    """Take every patch out again; one that somebody else wrapped since becomes transparent."""
    while _applied:
        patch = _applied.pop()
        patch.live = False
        if getattr(patch.owner, patch.name, None) is patch.replacement:
            setattr(patch.owner, patch.name, patch.original)


def arm(hooks: Iterable[Symbol]) -> None:
    """Watch the modules of a ledger's hooks."""
    for hook in hooks:
        for target in hook.targets:
            module_name, _, attribute = target.partition(":")
            install = functools.partial(_install, hook, attribute)
            try:
                watcher.watch(module_name, install)
            except ImportError as error:
                failed[hook.id] = error


def _install(hook: Symbol, attribute: str, module: ModuleType) -> None:
    """Wrap one target; a failure waits in :data:`failed` until a feature asks for the hook."""
    try:
        owner, name = find(module, attribute)
        if owner is None:
            return
        assert hook.handler is not None
        handler_module, _, function = hook.handler.partition(":")
        handler = getattr(importlib.import_module(handler_module), function)
        wrap(owner, name, handler, hook.id)
    except Exception as error:
        _fail(hook.id, hook.handler or "plugins", error)


def when_imported(module_name: str, mark: str, function: str) -> None:
    """Call ``function`` (``module:function`` of ours) with the module, once it is imported.

    For registries, where nothing is to be wrapped. A failure waits in :data:`failed` as above.
    """
    try:
        watcher.watch(module_name, functools.partial(_call, mark, function))
    except ImportError as error:
        failed[mark] = error


def _call(mark: str, function: str, module: ModuleType) -> None:
    try:
        handler_module, _, name = function.partition(":")
        getattr(importlib.import_module(handler_module), name)(module)
    except Exception as error:
        _fail(mark, function, error)


def _fail(mark: str, handler: str, error: Exception) -> None:
    failed[mark] = error
    package = handler.partition(".")[0]
    print(f"{package}: hook {mark!r} is off: {error!r}", file=sys.stderr)


def state(symbol: Symbol) -> str:
    """``hooked``, ``waiting`` (its module is not imported yet) or ``missing``."""
    modules = [sys.modules.get(target.partition(":")[0]) for target in symbol.targets]
    for module, target in zip(modules, symbol.targets, strict=True):
        owner, name = find(module, target.partition(":")[2]) if module else (None, "")
        if owner is not None and is_hooked(getattr(owner, name), symbol.id):
            return "hooked"
    return "waiting" if symbol.id not in failed and not any(modules) else "missing"


def _is_ours(function: Any, mark: str) -> bool:
    """Whether ``function`` itself is the wrapper ``mark``, and not undone."""
    patch = getattr(function, _PATCH, None)
    return patch is not None and patch.live and patch.mark == mark


def is_hooked(function: Any, mark: str) -> bool:
    """Whether our wrapper is ``function`` or lies under wrappers of others."""
    while function is not None:
        if _is_ours(function, mark):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def find(module: ModuleType, attribute: str) -> tuple[Any, str]:
    """Owner and last name of ``attribute`` (``function`` or ``Class.method``); None: absent."""
    owner: Any = module
    *path, name = attribute.split(".")
    for step in path:
        owner = getattr(owner, step, None)
    return (owner if hasattr(owner, name) else None), name
