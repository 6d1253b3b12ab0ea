"""``python -m deepspeed_plugins SCRIPT [ARGUMENTS ...]``; see :mod:`deepspeed_plugins.run`."""

import sys

from deepspeed_plugins.run import run

run(sys.argv[1:])
