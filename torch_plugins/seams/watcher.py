"""Call back when an upstream module is imported, before any importer can bind its names.

One ``sys.meta_path`` finder. For a watched name it lets the remaining finders locate the module and
runs the callbacks right after the module's own code; any other import costs one dict lookup.
Standard library only: ``import torch`` runs this.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_after: dict[str, list[Callable[[ModuleType], Any]]] = {}
_before: dict[str, list[Callable[[], Any]]] = {}
_resolving = threading.local()
_lock = threading.Lock()


def watch(name: str, callback: Callable[[ModuleType], Any]) -> None:
    """Run ``callback(module)`` each time the module ``name`` has been executed (a reload counts),
    and at once where it is imported already.

    Raises:
        ImportError: the module is executing right now, so its names cannot be patched any more.
    """
    with _lock:
        _after.setdefault(name, []).append(callback)
    _arm()
    module = sys.modules.get(name)
    if module is not None:
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            raise ImportError(f"{name} was half imported when the plugins were armed")
        callback(module)


def before(name: str, callback: Callable[[], Any]) -> None:
    """Run ``callback()`` once, just before ``name`` is first imported, or at once if it is already.

    For a package that must find the process prepared; it also works for namespace packages.
    """
    if name in sys.modules:
        callback()
        return
    with _lock:
        _before.setdefault(name, []).append(callback)
    _arm()


def _arm() -> None:
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in _before:
            with _lock:
                callbacks = _before.pop(name, [])
            for callback in callbacks:
                callback()
        if name not in _after:
            return None
        resolving: set[str] = _resolving.__dict__.setdefault("names", set())
        if name in resolving:  # another delegating finder asks us back
            return None
        resolving.add(name)
        try:
            spec = self._ask_the_others(name, path, target)
        finally:
            resolving.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(name, spec.loader)  # type: ignore[assignment]
        return spec

    def _ask_the_others(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        here = finders.index(self) if self in finders else -1
        for finder in finders[here + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None


_FINDER = _Finder()


class _Loader:
    """The real loader, followed by the callbacks; the module sees only the real one."""

    def __init__(self, name: str, inner: Any) -> None:
        self._name = name
        self._inner = inner

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        for callback in list(_after.get(self._name, ())):
            callback(module)
