"""Installed and without a plugin flag, nothing changes; broken, ``import torch`` still works."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.megatron.harness import TRAIN_GPT, train

ROOT = Path(__file__).parents[2]


def python(code, tmp_path, timeout=120, **environment):
    """Run ``code`` in a fresh interpreter that sees no environment of ours but ``environment``."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_losses_are_bitwise_those_of_a_run_without_the_plugins(tmp_path):
    """The arm without them still needs the CPU backend, which it puts in place by hand."""
    bare = tmp_path / "bare.py"
    bare.write_text(
        textwrap.dedent(f"""
        import atexit
        import runpy
        import sys
        from megatron_plugins import cpu
        from torch_plugins.seams import watcher

        def adjust(arguments):
            def validate_args(args, *rest):
                cpu.adjust_args(args)
                return upstream(args, *rest)

            upstream, arguments.validate_args = arguments.validate_args, validate_args

        cpu.install()
        watcher.watch("megatron.training.arguments", adjust)
        seams = "_plugins.seams."
        atexit.register(lambda: print("SEAMS", sorted(m for m in sys.modules if seams in m)))
        runpy.run_path({str(TRAIN_GPT)!r}, run_name="__main__")
        """)
    )
    flags = ("--hidden-dropout", 0.1, "--num-experts", 4, "--disable-bias-linear")
    installed = train(*flags)
    hosts = ("MEGATRON", "DEEPSPEED", "TORCH")
    off = {f"{host}_PLUGINS_DISABLE": "1" for host in hosts}
    without = train(*flags, script=bare, environment=off)
    assert "SEAMS ['torch_plugins.seams.watcher']" in without.output
    assert "ladder_residual" not in without.output
    assert "ladder_residual ................................. False" in installed.output
    assert len(installed.losses) == 6
    assert installed.losses == without.losses
    assert installed.grad_norms == without.grad_norms


def test_block_submodules_are_untouched_and_no_feature_is_imported(tmp_path):
    result = python(
        """
        import sys
        import torch
        from megatron.core.transformer import transformer_block as block
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.transformer_config import TransformerConfig
        import megatron.training

        config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
        spec = block.TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec()] * 2)
        assert block._get_block_submodules.__wrapped__ is not block._get_block_submodules
        assert block._get_block_submodules(config, spec) is spec
        for module in ("layers", "ladder_residual", "specs", "cpu.table"):
            assert f"megatron_plugins.{module}" not in sys.modules, module
        print("FINE")
        """,
        tmp_path,
    )
    assert "FINE" in result.stdout, result.stderr


@pytest.mark.quiet
def test_import_torch_gets_the_watcher_and_nothing_else(tmp_path):
    result = python(
        """
        import sys, json, time
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        from megatron_plugins._autoload import activate
        activate()
        spent = time.perf_counter() - start
        print(json.dumps({"new": sorted(set(sys.modules) - before), "seconds": spent}))
        """,
        tmp_path,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    report = json.loads(result.stdout)
    ours = {name for name in report["new"] if name.split(".")[0] not in sys.stdlib_module_names}
    assert ours == {
        "megatron_plugins",
        "megatron_plugins._autoload",
        "megatron_plugins.seams",
        "megatron_plugins.seams.doors",
        "megatron_plugins.seams.ledger",
        "megatron_plugins.seams.te",
        "megatron_plugins.seams.used",
        "torch_plugins",
        "torch_plugins.seams",
        "torch_plugins.seams.patch",
        "torch_plugins.seams.symbol",
        "torch_plugins.seams.watcher",
    }
    assert report["seconds"] < 0.25  # about 0.01 on a quiet machine


def test_import_of_the_package_does_not_import_torch(tmp_path):
    result = python("import megatron_plugins, sys; print('torch' in sys.modules)", tmp_path)
    assert result.stdout == "False\n"


@pytest.fixture
def copy_of_the_package(tmp_path):
    """Both packages and the installed metadata on a path of their own, to be damaged."""
    site = tmp_path / "site"
    for package in ("megatron_plugins", "torch_plugins"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, site / package, ignore=ignore)
    metadata = site / "megatron_deepspeed_plugins-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-deepspeed-plugins\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\nmegatron_plugins = megatron_plugins._autoload:activate\n"
    )
    return site


IMPORT_TORCH = """
import sys
import torch
import megatron_plugins
assert megatron_plugins.__file__.startswith({site!r})
assert torch.ones(2).sum() == 2
print("ARMED" if any("_Finder" in repr(finder) for finder in sys.meta_path) else "OFF")
"""


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        "megatron_plugins/seams/__init__.py",
        "megatron_plugins/seams/ledger.py",
        "torch_plugins/seams/watcher.py",
        "torch_plugins/seams/patch.py",
    ],
)
def test_import_torch_survives_a_broken_package(copy_of_the_package, tmp_path, damaged):
    if damaged:
        (copy_of_the_package / damaged).write_text("def broken(:\n")
    code = IMPORT_TORCH.format(site=str(copy_of_the_package))
    result = python(code, tmp_path, PYTHONPATH=str(copy_of_the_package))
    assert result.returncode == 0, result.stderr
    if damaged:
        assert result.stdout == "OFF\n"
        assert result.stderr.count("megatron_plugins is off, it failed to load: SyntaxError") == 1
    else:
        assert result.stdout == "ARMED\n"
        assert "megatron_plugins" not in result.stderr


def test_megatron_survives_broken_flags_but_knows_none(copy_of_the_package, tmp_path):
    (copy_of_the_package / "megatron_plugins/cpu/__init__.py").write_text("def broken(:\n")
    code = """
    import sys
    import torch
    from megatron.training.arguments import parse_args
    sys.argv = ["pretrain_gpt.py"]
    assert not hasattr(parse_args(), "ladder_residual")
    sys.argv = ["pretrain_gpt.py", "--ladder-residual"]
    parse_args()
    """
    result = python(code, tmp_path, PYTHONPATH=str(copy_of_the_package))
    assert result.returncode == 2, result.stderr
    assert "hook 'flags' is off: SyntaxError" in result.stderr
    assert "unrecognized arguments: --ladder-residual" in result.stderr
