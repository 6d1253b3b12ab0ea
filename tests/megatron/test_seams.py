"""The import watcher and the patches on modules of our own making; the ledger on real Megatron."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from megatron_plugins import doctor
from megatron_plugins.features import adapter
from megatron_plugins.seams import requirements, versions
from megatron_plugins.seams.ledger import HOOKS, USED
from torch_plugins.config import FEATURES, ConfigError
from torch_plugins.seams import patch, watcher
from torch_plugins.seams.symbol import Symbol

PACKAGE = Path(requirements.__file__).parents[1]


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A package ``upstream`` with modules ``defines`` (a function) and ``binds`` (its importer);
    it is forgotten afterwards, and so is what was watched."""
    package = tmp_path / "upstream"
    package.mkdir()
    (package / "defines.py").write_text(
        "def answer(x, *, plus=0):\n    'Doc.'\n    return x + plus\n"
    )
    (package / "binds.py").write_text("from upstream.defines import answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(watcher, "_after", {})
    monkeypatch.setattr(watcher, "_before", {})
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "upstream"]:
        del sys.modules[name]


def test_callback_runs_before_an_importer_binds(upstream):
    watcher.watch("upstream.defines", lambda module: setattr(module, "answer", "patched"))
    assert importlib.import_module("upstream.binds").answer == "patched"


def test_callback_runs_at_once_for_an_imported_module(upstream):
    importlib.import_module("upstream.defines")
    seen = []
    watcher.watch("upstream.defines", seen.append)
    assert [module.__name__ for module in seen] == ["upstream.defines"]


def test_callback_runs_again_after_reload(upstream):
    seen = []
    watcher.watch("upstream.defines", seen.append)
    module = importlib.import_module("upstream.defines")
    importlib.reload(module)
    assert seen == [module, module]


def test_a_half_imported_module_is_an_error(upstream):
    (upstream / "defines.py").write_text(
        "from torch_plugins.seams import watcher\nwatcher.watch('upstream.defines', print)\n"
    )
    with pytest.raises(ImportError, match="half imported"):
        importlib.import_module("upstream.defines")


def test_module_keeps_its_own_loader(upstream):
    watcher.watch("upstream.defines", lambda module: None)
    spec = importlib.util.find_spec("upstream.defines")
    assert "def answer" in spec.loader.get_source("upstream.defines")
    module = importlib.import_module("upstream.defines")
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert "def answer" in inspect.getsource(module)
    assert pkgutil.get_data("upstream.defines", "binds.py")


@pytest.mark.parametrize("place", ["in front", "behind"])
def test_another_delegating_finder_does_not_recurse(upstream, monkeypatch, place):
    class Delegating:
        """As other patch packs do: ask everybody else, us included."""

        def find_spec(self, name, path=None, target=None):
            others = [finder for finder in sys.meta_path if finder is not self]
            specs = (finder.find_spec(name, path, target) for finder in others)
            return next((spec for spec in specs if spec), None)

    seen = []
    watcher.watch("upstream.defines", seen.append)
    finders = list(sys.meta_path)
    finders.insert(finders.index(watcher._FINDER) + (place == "behind"), Delegating())
    monkeypatch.setattr(sys, "meta_path", finders)
    importlib.import_module("upstream.defines")
    assert len(seen) == 1


def test_missing_module_stays_missing(upstream):
    watcher.watch("upstream.nothing", print)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("upstream.nothing")


def test_before_runs_once_ahead_of_a_namespace_package(upstream):
    seen = []
    watcher.before("upstream", lambda: seen.append("upstream" in sys.modules))
    importlib.import_module("upstream.defines")
    assert seen == [False]
    watcher.before("upstream", lambda: seen.append("upstream" in sys.modules))
    assert seen == [False, True]


def test_threads_import_a_watched_module_once(upstream):
    seen = []
    watcher.watch("upstream.defines", seen.append)
    threads = [
        threading.Thread(target=importlib.import_module, args=("upstream.binds",)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1


@pytest.fixture
def patches(monkeypatch):
    monkeypatch.setattr(patch, "_applied", [])
    yield
    patch.undo_all()


def double(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


def test_wrap_forwards_keeps_wrapped_and_is_idempotent(upstream, patches):
    module = importlib.import_module("upstream.defines")
    original = module.answer
    for _ in range(2):
        patch.wrap(module, "answer", double, "test")
    assert module.answer(1, plus=2) == 6
    assert module.answer.__wrapped__ is original
    assert (module.answer.__name__, module.answer.__doc__) == ("answer", "Doc.")
    patch.undo_all()
    assert module.answer is original


def test_undo_under_a_wrapper_of_somebody_else(upstream, patches):
    module = importlib.import_module("upstream.defines")
    patch.wrap(module, "answer", double, "test")
    ours = module.answer
    module.answer = lambda *args, **kwargs: ours(*args, **kwargs)
    patch.undo_all()
    assert module.answer(1) == 1


def test_a_copy_of_an_undone_wrapper_can_be_wrapped_again(upstream, patches):
    module = importlib.import_module("upstream.defines")
    patch.wrap(module, "answer", double, "test")
    importer = importlib.import_module("upstream.binds")
    patch.undo_all()
    assert importer.answer(1) == 1
    patch.wrap(importer, "answer", double, "test")
    assert importer.answer(1) == 2


def test_a_hook_that_fails_to_load_is_told_and_blocks_its_feature(
    upstream, patches, monkeypatch, capsys
):
    monkeypatch.setattr(patch, "failed", {})
    hook = Symbol("flags", ("upstream.defines:answer",), "any", "why", "when", handler="no:no")
    module = importlib.import_module("upstream.defines")
    original = module.answer
    patch._install(hook, "answer", module)
    assert module.answer is original
    assert "'flags' is off" in capsys.readouterr().err
    monkeypatch.setattr(requirements, "HOOKS", (hook,))
    with pytest.raises(ConfigError, match=r"--x needs upstream.defines:answer .*missing"):
        requirements.require("ladder_residual", "--x")


@pytest.mark.parametrize("symbol", [*HOOKS, *USED], ids=lambda symbol: symbol.id)
def test_ledger_matches_the_installed_megatron(symbol):
    row = doctor.examine(symbol)
    assert row["state"] == ("hooked" if symbol.handler else "found"), row
    assert not row["wrapped_by"]
    module_name, _, attribute = row["target"].partition(":")
    owner, name = patch.find(sys.modules[module_name], attribute)
    if symbol.relies_on:
        source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
        assert [word for word in symbol.relies_on if word not in source] == []


def test_ledger_ids_are_unique_and_features_exist():
    ids = [symbol.id for symbol in (*HOOKS, *USED)]
    assert len(ids) == len(set(ids))
    keys = {"any", "export", *(feature.key() for feature in FEATURES)}
    assert {symbol.feature for symbol in (*HOOKS, *USED)} <= keys


def test_every_feature_has_an_adapter_that_keeps_the_contract():
    for feature in FEATURES:
        module = adapter(feature.key())
        assert module.REFUSED
        assert callable(module.validate)
        assert callable(module.adjust_config)


def sources(*apart):
    """Files that may not name upstream symbols on their own; cpu/ has its table of pieces."""
    apart = ("seams", "cpu", *apart)
    return [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in apart]


def upstream_imports(tree):
    """``module:name`` for every import from Megatron."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            deep = (a.name for a in node.names if a.name.startswith("megatron."))
            yield from (name for name in deep if name != "megatron.core")


def test_every_upstream_import_is_in_the_ledger():
    listed = {target for symbol in (*HOOKS, *USED) for target in symbol.targets}
    found = {
        (path.name, target)
        for path in sources()
        for target in upstream_imports(ast.parse(path.read_text()))
    }
    assert found
    assert [where for where in sorted(found) if where[1] not in listed] == []


def test_no_patch_target_is_spelled_outside_seams():
    for path in sources("export"):  # which lists the classes that a checkpoint may hold
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                dotted = node.value.startswith(("megatron.core", "megatron.training"))
                assert not dotted or " " in node.value, f"{path.name}: {node.value}"


def test_window():
    assert versions.verdict((0, 17, 1)) is None
    assert versions.verdict((0, 20, 0)) is None
    assert "no megatron.training" in versions.verdict((0, 16, 1))
    assert "newer than the tested" in versions.verdict((0, 21, 0))
    assert "not installed" in versions.verdict(None)
    assert versions.verdict(versions.installed()) is None
