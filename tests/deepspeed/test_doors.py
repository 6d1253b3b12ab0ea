"""The doors, on an example script that knows nothing of plugins: the installed entry point,
``-m deepspeed_plugins`` under two launchers, ``import deepspeed_plugins``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.harness import free_port, launch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "power_lr"
SCRIPT = ROOT / "examples" / "deepspeed" / "train_deepspeed.py"
ACTIVE = "power-lr: peak 0.01, a 4, b -0.51, "
LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner")
"""What the command ``deepspeed`` runs."""
UNARMED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
QUICK = {"PYTHONPATH": f"{Path(__file__).with_name('site')}{os.pathsep}{ROOT}"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Ten steps of a small model on a text of its own."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    short = ("--sequence-length", 128, "--width", 16, "--steps", 10)
    return ("--deepspeed_config", EXAMPLE / "ds_config.json", "--text", text, *short)


def run(*command, **environment):
    """Output and exit code of a command."""
    result = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return result.stdout, result.returncode


def test_unmodified_script_with_only_the_json(arguments):
    _, logs = launch(SCRIPT, *arguments, processes=1, environment=QUICK)
    assert logs[0].count(ACTIVE + "16 sequences of 128 tokens, warms up over 20,480") == 1
    assert re.search(r"step +10  lr 0.009000  loss \d", logs[0])


def test_without_the_plugins_it_dies(arguments):
    code, logs = launch(
        SCRIPT, *arguments, processes=1, environment=QUICK | UNARMED, check=False
    )  # fmt: skip
    assert code == 1
    assert "DeepSpeed does not recognize LR scheduler PowerLR" in logs[0]


def test_module_door_under_deepspeeds_launcher(arguments):
    command = ("--module", "deepspeed_plugins", SCRIPT, *arguments)
    output, code = run(
        *LAUNCHER, "--num_accelerators", 1, "--master_port", free_port(), *command,
        **QUICK, **UNARMED,
    )  # fmt: skip
    assert code == 0, output
    assert output.count(ACTIVE) == 1


def test_module_door_under_torchrun(arguments):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    command = (*launcher, "-m", "deepspeed_plugins", SCRIPT, *arguments)
    output, code = run(sys.executable, *command, **QUICK, **UNARMED)
    assert code == 0, output
    assert output.count(ACTIVE + "32 sequences") == 1


def test_the_launchers_local_rank_goes_to_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    module = (sys.executable, "-m", "deepspeed_plugins")
    output, code = run(*module, "--local_rank=1", script, "--flag", "value", **QUICK, **UNARMED)
    assert (output, code) == ("['--local_rank=1', '--flag', 'value']\n", 0)


@pytest.mark.parametrize("command", [(), ("--local_rank=0",), ("missing.py",)])
def test_no_script(command):
    output, code = run(sys.executable, "-m", "deepspeed_plugins", *command, **QUICK, **UNARMED)
    assert code == 1
    assert "usage: python -m deepspeed_plugins SCRIPT" in output


IMPORT = """
import {modules}, json
from deepspeed.runtime import engine, lr_schedules
from torch_plugins.seams import patch
from deepspeed_plugins.seams.ledger import HOOKS
print(json.dumps([hasattr(lr_schedules, "PowerLR"), [patch.state(hook) for hook in HOOKS]]))
"""


@pytest.mark.parametrize(
    ("modules", "environment", "armed"),
    [
        ("deepspeed_plugins", UNARMED, True),
        ("deepspeed, deepspeed_plugins", UNARMED, True),
        ("deepspeed", {}, True),
        ("deepspeed, deepspeed_plugins", {"DEEPSPEED_PLUGINS_DISABLE": "1"}, False),
    ],
)
def test_import_door_in_any_order(modules, environment, armed):
    code = IMPORT.format(modules=modules)
    output, status = run(sys.executable, "-c", code, **QUICK, **environment)
    assert status == 0, output
    registered, states = json.loads(output.splitlines()[-1])
    assert registered is armed
    assert set(states) == {"hooked" if armed else "missing"}


def test_arming_imports_neither_torch_nor_deepspeed():
    code = "import deepspeed_plugins, sys; print({'torch', 'deepspeed'} & set(sys.modules))"
    assert run(sys.executable, "-c", code, **QUICK) == ("set()\n", 0)
