"""Put the modelling code into a model folder, flat, as ``trust_remote_code`` expects it.

Standard library only. The folder carries this file because the configuration imports it; a model
loaded from the folder is saved again by transformers itself.
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

SOURCES = (
    "../auxiliary_loss.py",
    "../config.py",
    "../dense_moe.py",
    "../dense_moe_attention.py",
    "../dense_moe_config.py",
    "../desync_config.py",
    "../feature.py",
    "../w4a4_config.py",
    "attention.py",
    "configuration_plugin_decoder.py",
    "desync.py",
    "experts.py",
    "mlp.py",
    "modeling_plugin_decoder.py",
    "norm.py",
    "parallel.py",
    "remote_code.py",
    "router.py",
)
"""What the decoder imports of ours, relative to this file."""


def write_remote_code(folder: str | os.PathLike[str]) -> list[Path]:
    """Copy the files of the decoder into ``folder``; ``from ..x`` becomes ``from .x``, and what a
    file does as a command stays behind.

    Returns:
        The files written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for source in SOURCES:
        text = (Path(__file__).parent / source).read_text("utf-8")
        text = re.sub(r"^(\s*from )\.\.(?=\w)", r"\1.", text, flags=re.MULTILINE)
        text = text.partition('\n\nif __name__ == "__main__":')[0]  # a command of ours
        written.append(target / Path(source).name)
        written[-1].write_text(text, "utf-8")
    return written
