"""Run a training script as if directly, from ``python -m <plugins> SCRIPT [ARGUMENTS ...]``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence


def run(command: Sequence[str], usage: str) -> None:
    """Run ``[script, *arguments]`` as ``__main__``.

    Raises:
        SystemExit: no script was named, or it does not exist; ``usage`` says how.
    """
    if not command or command[0].startswith("-"):
        raise SystemExit(usage)
    script = command[0]
    if not os.path.isfile(script):
        raise SystemExit(f"{usage}\nno such script: {script}")
    sys.argv = list(command)
    if not getattr(sys.flags, "safe_path", False):  # python -P puts no folder there
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(os.path.abspath(script), run_name="__main__")
