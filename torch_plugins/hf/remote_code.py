"""Put the modelling code into a model folder, flat, as ``trust_remote_code`` expects it.

Standard library only. It works from our package and from a folder it wrote itself, so a model
loaded from an exported folder can be saved again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_plugin_decoder.PluginDecoderConfig",
    "AutoModel": "modeling_plugin_decoder.PluginDecoderModel",
    "AutoModelForCausalLM": "modeling_plugin_decoder.PluginDecoderForCausalLM",
}
"""``auto_map`` of ``config.json``: file and class behind each Auto class."""

FILES = (
    "config.py",
    "ladder_residual.py",
    "attention.py",
    "mlp.py",
    "norm.py",
    "remote_code.py",
    "configuration_plugin_decoder.py",
    "modeling_plugin_decoder.py",
)


def write_remote_code(folder: str | os.PathLike[str]) -> list[Path]:
    """Copy the files of the decoder into ``folder``; ``from ..x`` becomes ``from .x``.

    Returns:
        The files written.
    """
    here = Path(__file__).resolve().parent
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name in FILES:
        source = here / name if (here / name).exists() else here.parent / name
        text = re.sub(
            r"^(\s*from )\.\.(?=\w)", r"\1.", source.read_text("utf-8"), flags=re.MULTILINE
        )
        (target / name).write_text(text, "utf-8")
        written.append(target / name)
    return written
