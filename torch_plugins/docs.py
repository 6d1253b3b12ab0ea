"""The README's flag table, generated from the feature dataclasses.

``python -m torch_plugins.docs`` prints it; with a file name, it rewrites what stands between the
markers ``<!-- flags -->`` and ``<!-- /flags -->`` there.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from torch_plugins.config import FEATURES, Feature

SECTION = re.compile(r"(?<=<!-- flags -->\n).*?(?=<!-- /flags -->)", re.DOTALL)

HEADER = ("Flag", "What it does", "Default", "DeepSpeed JSON, Hugging Face config")


def flag_table() -> str:
    """One row per flag of every feature, as Markdown with a final newline."""
    rows: list[tuple[str, ...]] = [HEADER, ("---",) * len(HEADER)]
    for feature in FEATURES:
        rows += _rows(feature)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _rows(feature: type[Feature]) -> list[tuple[str, ...]]:
    paper = f"[{feature.title}](https://arxiv.org/abs/{feature.paper})"
    rows: list[tuple[str, ...]] = [
        (f"`{feature.flag()}`", f"Turns {paper} on.", "off", feature.where())
    ]
    for field in dataclasses.fields(feature):
        flag = " ".join(filter(None, (feature.flag(field.name), field.metadata["metavar"])))
        what = field.metadata["help"].replace("|", "\\|")
        if choices := field.metadata["choices"]:
            what += f" One of {', '.join(choices)}."
        default = "" if field.default is None else f"`{field.default}`"
        rows.append((f"`{flag}`", what, default, feature.where(field.name)))
    return rows


def updated(text: str) -> str:
    """``text`` with the current table between its markers.

    Raises:
        ValueError: it has no markers.
    """
    if not SECTION.search(text):
        raise ValueError("no <!-- flags --> and <!-- /flags --> in the text")
    return SECTION.sub(lambda _: flag_table(), text)


if __name__ == "__main__":
    if not sys.argv[1:]:
        print(flag_table(), end="")
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(updated(path.read_text()))
