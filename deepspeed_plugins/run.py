"""The explicit door: run a training script as if directly, with the plugins armed.

Works where the package has no installed entry point, such as on PYTHONPATH::

    deepspeed --module deepspeed_plugins train.py <arguments>
    torchrun --nproc-per-node 8 -m deepspeed_plugins train.py <arguments>
    accelerate launch -m deepspeed_plugins train.py <arguments>
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_plugins.seams import script

USAGE = f"usage: python -m deepspeed_plugins SCRIPT [ARGUMENTS ...]\n{__doc__}"


def run(command: Sequence[str]) -> None:
    """Run ``[script, *arguments]`` as ``__main__``; importing this package armed the plugins.

    DeepSpeed's launcher puts ``--local_rank=N`` before the script: the script gets it as its first
    argument, as when it is launched directly.

    Raises:
        SystemExit: no script was named, or it does not exist.
    """
    command = list(command)
    if len(command) > 1 and command[0].startswith("--local_rank="):
        command[:2] = command[1::-1]
    script.run(command, USAGE)
