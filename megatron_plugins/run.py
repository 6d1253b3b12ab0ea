"""The explicit door: run a training script as if directly, with the plugins armed.

Works where the package has no installed entry point, such as on PYTHONPATH::

    python -m megatron_plugins pretrain_gpt.py <flags>
    torchrun --nproc-per-node 8 -m megatron_plugins pretrain_gpt.py <flags>
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_plugins.seams import script

USAGE = f"usage: python -m megatron_plugins SCRIPT [ARGUMENTS ...]\n{__doc__}"


def run(command: Sequence[str]) -> None:
    """Run ``[script, *arguments]`` as ``__main__``; importing this package armed the plugins.

    Raises:
        SystemExit: no script was named, or it does not exist.
    """
    script.run(command, USAGE)
