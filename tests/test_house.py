"""Rules of the repository that no tool checks. Reads files only: neither torch nor Megatron."""

import ast
import re
import sys
from pathlib import Path

import pytest
import tomllib

from torch_plugins import docs

ROOT = Path(__file__).parents[1]
TREES = ("torch_plugins", "megatron_plugins", "deepspeed_plugins", "csrc", "examples", "tests")
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".sh",
    ".yml",
    ".yaml",
    ".json",
    ".txt",
    ".cfg",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
}

MAY_IMPORT = {
    "torch_plugins": {"torch", "torch_plugins"},
    "torch_plugins/hf": {"torch", "torch_plugins", "transformers"},
    "torch_plugins/ops/triton": {"torch", "torch_plugins", "triton"},
    "torch_plugins/export": {
        "torch",
        "torch_plugins",
        "transformers",
        "safetensors",
        "huggingface_hub",
    },
    "torch_plugins/vllm": {"torch", "torch_plugins", "vllm"},
    "megatron_plugins": {"torch", "torch_plugins", "megatron_plugins", "megatron"},
    "deepspeed_plugins": {"torch", "torch_plugins", "deepspeed_plugins", "deepspeed"},
}
"""Beyond the standard library. The longest prefix of a file's path counts."""

COMMANDS = {
    "torch_plugins/power_lr_cli.py": {"matplotlib", "rich"},
    "torch_plugins/dense_moe_cli.py": {"matplotlib", "rich", "transformers"},
}
"""Files that may import more, within a function: needed only when the command runs."""

WITHIN_FUNCTIONS = {
    "torch_plugins/w4a4": {
        "compressed_tensors",
        "matplotlib",
        "rich",
        "safetensors",
        "transformers",
    },
}
"""The same for folders whose other files a command uses."""

STDLIB_ONLY = (
    "megatron_plugins/__init__.py",
    "megatron_plugins/_autoload.py",
    "megatron_plugins/seams",
    "torch_plugins/__init__.py",
    "torch_plugins/_autoload.py",
    "torch_plugins/config.py",
    "torch_plugins/dense_moe_config.py",
    "torch_plugins/feature.py",
    "torch_plugins/seams",
    "torch_plugins/trainer.py",
    "deepspeed_plugins/__init__.py",
    "deepspeed_plugins/_autoload.py",
    "deepspeed_plugins/seams",
)
"""What ``import torch`` runs, besides the packages themselves."""


def files():
    """Every text file of ours; build products and environments lie elsewhere."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    deep = [path for tree in TREES for path in (ROOT / tree).rglob("*") if path.is_file()]
    ci = [path for path in (ROOT / ".ci").rglob("*") if path.is_file()]
    named = ("Makefile", "run")
    return [p for p in (*top, *deep, *ci) if p.suffix in TEXT or p.name in named]


def python_files(*trees):
    return [p for p in files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in trees]


def absolute_imports(path):
    """``(line, top-level package)`` of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from imported(node)


def imported(node):
    """The same of one node."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.lineno, (node.module or "").split(".")[0]


def allowed_in(name):
    """Packages that the file ``name`` (relative to the root) may import."""
    trees = [tree for tree in MAY_IMPORT if name.startswith(tree + "/")]
    more = [names for tree, names in WITHIN_FUNCTIONS.items() if name.startswith(tree + "/")]
    within = COMMANDS.get(name, set()).union(*more)
    return MAY_IMPORT[max(trees, key=len)] | sys.stdlib_module_names | within


def test_imports_go_one_way():
    found = python_files("torch_plugins", "megatron_plugins", "deepspeed_plugins")
    assert len(found) > 20
    wrong = []
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        allowed = allowed_in(name)
        wrong += [f"{name}:{line} {m}" for line, m in absolute_imports(path) if m not in allowed]
    assert wrong == []


def test_commands_import_what_they_draw_with_when_they_run():
    for name, packages in COMMANDS.items():
        at_once = re.findall(r"^(?:import|from) (\w+)", (ROOT / name).read_text(), re.MULTILINE)
        assert "argparse" in at_once
        assert packages.isdisjoint(at_once)
    for tree, packages in WITHIN_FUNCTIONS.items():
        for path in (ROOT / tree).rglob("*.py"):
            at_once = [m for node in ast.parse(path.read_text()).body for _, m in imported(node)]
            assert packages.isdisjoint(at_once), path


def test_what_import_torch_runs_is_standard_library():
    ours = {"megatron_plugins", "deepspeed_plugins", "torch_plugins"}
    wrong = []
    for path in python_files(*ours):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(STDLIB_ONLY):
            known = ours | sys.stdlib_module_names
            wrong += [f"{name}:{line} {m}" for line, m in absolute_imports(path) if m not in known]
    assert wrong == []


def dependencies():
    """Every requirement that pip could be given by this repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    yield from project["build-system"]["requires"]
    yield from project["project"]["dependencies"]
    for group in project["project"]["optional-dependencies"].values():
        yield from group
    for group in project.get("dependency-groups", {}).values():
        yield from group
    for path in ROOT.glob("*requirements*.txt"):
        yield from path.read_text().split("\n")
    for path in files():
        if path.suffix in {".sh", ""}:
            for command in re.findall(r"pip install(.*)", path.read_text()):
                yield from command.split()


def test_nothing_depends_on_the_apex_of_pypi():
    """An unrelated package of that name; NVIDIA's is built from source, by who wants it."""
    names = {re.split(r"[^\w.-]", requirement.strip().lower())[0] for requirement in dependencies()}
    assert "torch" in names
    assert "apex" not in names


def test_installing_pulls_nothing_in():
    """torch, Megatron-Core and transformers are the user's own and must not be moved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []


def test_files_stay_short():
    lengths = {p.relative_to(ROOT): p.read_text().count("\n") for p in files() if p.suffix == ".py"}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}


def test_no_path_of_a_machine():
    machine = re.compile(r"(?<![\w.}])/(?:work|root|home|tmp)/\w")
    wrong = []
    for path in files():
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if machine.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert wrong == []


def test_readme_has_the_current_flag_table():
    readme = ROOT / "README.md"
    if not readme.exists() or "<!-- flags -->" not in readme.read_text():
        pytest.skip("no README with a flag table yet")
    text = readme.read_text()
    assert text == docs.updated(text), "run: python -m torch_plugins.docs README.md"


def test_flag_table():
    table = docs.flag_table()
    assert "| `--ladder-layers SPEC` | Layers that use the ladder" in table
    assert {line.count(" | ") for line in table.splitlines()} == {3}
    text = "before\n<!-- flags -->\nold\n<!-- /flags -->\nafter\n"
    assert docs.updated(text) == text.replace("old\n", table)
    assert docs.updated(docs.updated(text)) == docs.updated(text)
    with pytest.raises(ValueError, match="flags"):
        docs.updated("no markers")
