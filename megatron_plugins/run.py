"""The explicit door: run a training script as if directly, with the plugins armed.

Works where the package has no installed entry point, such as on PYTHONPATH::

    python -m megatron_plugins pretrain_gpt.py <flags>
    torchrun --nproc-per-node 8 -m megatron_plugins pretrain_gpt.py <flags>
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = "usage: python -m megatron_plugins SCRIPT [ARGUMENTS ...]"


def run(command: Sequence[str]) -> None:
    """Run ``[script, *arguments]`` as ``__main__``; importing this package armed the plugins.

    Raises:
        SystemExit: no script was named, or it does not exist.
    """
    if not command or command[0].startswith("-"):
        raise SystemExit(f"{USAGE}\n{__doc__}")
    script = command[0]
    if not os.path.isfile(script):
        raise SystemExit(f"{USAGE}\nno such script: {script}")
    sys.argv = list(command)
    if not getattr(sys.flags, "safe_path", False):  # python -P puts no folder there
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(os.path.abspath(script), run_name="__main__")
