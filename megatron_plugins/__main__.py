"""``python -m megatron_plugins SCRIPT [ARGUMENTS ...]``; see :mod:`megatron_plugins.run`."""

import sys

from megatron_plugins.run import run

run(sys.argv[1:])
