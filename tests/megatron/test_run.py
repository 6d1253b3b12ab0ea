"""The doors: the installed entry point, ``-m megatron_plugins``, ``import megatron_plugins``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.harness import TINY, TRAIN_GPT, free_port, train

ONCE = ("--ladder-residual", "--exit-interval", "1")
ACTIVE = "ladder-residual: 4 of 4 layers\n"


def run(*command, cwd=None, timeout=120, **environment):
    """Output and exit code of this interpreter on ``command``, without the entry point."""
    base = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**base, "GLOO_SOCKET_IFNAME": "lo", **environment},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return result.stdout, result.returncode


def test_script_runs_as_if_directly(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside\n"
        "print(__name__, __file__, sys.argv, sys.path[0], beside.NAME)\n"
        "sys.exit(3)\n"
    )
    direct = run(script, "--flag", "value")
    assert direct[1] == 3
    assert run("-m", "megatron_plugins", script, "--flag", "value") == direct


@pytest.mark.parametrize("command", [(), ("--ladder-residual", "x.py"), ("missing.py",)])
def test_no_script(command):
    output, code = run("-m", "megatron_plugins", *command)
    assert code == 1
    assert "usage: python -m megatron_plugins SCRIPT" in output


def test_without_entry_point_the_flag_is_unknown():
    parse = "import torch; from megatron.training.arguments import parse_args; parse_args()"
    output, code = run("-c", parse, *ONCE)
    assert code == 2
    assert "unrecognized arguments: --ladder-residual" in output


def test_module_door_under_torchrun():
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    output, code = run(
        *launcher, "-m", "megatron_plugins", TRAIN_GPT, *TINY, *ONCE, "--cpu-backend",
        "--tensor-model-parallel-size", 2,
    )  # fmt: skip
    assert code == 0, output
    assert output.count(ACTIVE) == 1


def test_import_door(tmp_path):
    script = tmp_path / "pretrain.py"
    script.write_text(
        f"import megatron_plugins, runpy\nrunpy.run_path({str(TRAIN_GPT)!r}, run_name='__main__')\n"
    )
    result = train(*ONCE, script=script, environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert ACTIVE in result.output


@pytest.mark.megatron_lm
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="needs MEGATRON_LM=path")
def test_unmodified_script_of_a_checkout():
    checkout = os.environ["MEGATRON_LM"]
    script = Path(checkout, "pretrain_gpt.py")
    result = train(*ONCE, script=script, environment={"PYTHONPATH": checkout})
    assert ACTIVE in result.output
    assert 1 in result.printed
    output, code = run(
        script, "--help", PYTHONPATH=checkout, TORCH_DEVICE_BACKEND_AUTOLOAD="1",
        MEGATRON_PLUGINS_CPU="1",
    )  # fmt: skip
    assert code == 0
    assert "Ladder Residual (plugin):\n  https://arxiv.org/abs/2501.06589" in output
