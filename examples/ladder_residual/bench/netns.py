"""A real slow link on one machine: two network namespaces, a veth pair, a token-bucket filter.

Needs root, ``ip`` and ``tc``. Packets are as large as the pair takes: the cost of small ones on the
CPU would eat what the overlap saves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

MTU, BURST = 65000, "256k"
DEVICE = "ladder"


def missing() -> str | None:
    """Why there can be no such link here; None: there can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    if os.geteuid() != 0:
        return "it needs root"
    probe = subprocess.run(["ip", "netns", "add", _name(9)], capture_output=True, text=True)
    if probe.returncode:
        return probe.stderr.strip()
    subprocess.run(["ip", "netns", "del", _name(9)], check=True)
    return None


def _name(rank: int) -> str:
    return f"ladder-{os.getpid()}-{rank}"


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def pair() -> Iterator[list[str]]:
    """Names of two namespaces, each with one end of a link as ``DEVICE``."""
    names = [_name(0), _name(1)]
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = [("name", DEVICE, "netns", name) for name in names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for rank, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "mtu", MTU, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def limit(bits_per_second: float | None) -> None:
    """Set the speed of this process's end; None: as fast as it is."""
    if bits_per_second is None:
        command = ["tc", "qdisc", "del", "dev", DEVICE, "root"]
        subprocess.run(command, capture_output=True)
        return
    rate = f"{max(int(bits_per_second / 1000), 1)}kbit"
    tbf = ["root", "tbf", "rate", rate, "burst", BURST, "latency", "10s"]
    subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, *tbf], check=True, capture_output=True)
