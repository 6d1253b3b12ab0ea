"""What a feature's configuration is made of: its fields, its names, its errors.

Standard library only: an exported Hugging Face folder carries it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


class ConfigError(ValueError):
    """A user's flag, JSON key or config field is wrong; the message names it and the remedy."""


def option(
    default: Any, help: str, metavar: str | None = None, choices: Sequence[str] | None = None
) -> Any:
    """A dataclass field that is also a command-line flag, with its help text."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class Feature:
    """Base of every feature's configuration."""

    name: ClassVar[str]
    """The enabling flag without its dashes; with underscores, the JSON key and HF config field."""
    prefix: ClassVar[str]
    """What the flags of the fields start with."""
    title: ClassVar[str]
    paper: ClassVar[str]
    """arXiv id."""
    switch: ClassVar[tuple[str, str] | None] = None
    """Megatron's option and its value that turn the feature on, in place of a flag of ours."""
    implied: ClassVar[bool] = False
    """Whether any flag of a field turns the feature on, without the enabling flag."""
    changes_model: ClassVar[bool] = True
    """Whether the same weights compute another function without it: checkpoints are compared."""
    changes_tensors: ClassVar[bool] = False
    """Whether a model has other tensors with it, so that no checkpoint without it can be loaded."""
    has_section: ClassVar[bool] = True
    """Whether the exported model's ``config.json`` has a section for it."""

    @classmethod
    def key(cls) -> str:
        """JSON key, HF config field and argparse destination of the enabling flag."""
        return cls.name.replace("-", "_")

    @classmethod
    def flag(cls, field_name: str | None = None) -> str:
        """Flag of one field, or what turns the feature on."""
        if field_name is None and cls.switch is not None:
            return " ".join(cls.switch)
        stem = cls.name if field_name is None else f"{cls.prefix}-{field_name}"
        return "--" + stem.replace("_", "-")

    @classmethod
    def dest(cls, field_name: str) -> str:
        """argparse destination of a field's flag."""
        return cls.flag(field_name)[2:].replace("-", "_")

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> Any:
        """Build from a JSON section; an unknown key is a :class:`ConfigError` with a suggestion."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in section:
            if key not in known:
                raise ConfigError(f"{cls.key()}: unknown key {key!r}{did_you_mean(key, known)}")
        return cls(**section)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def function(self, num_layers: int) -> Any:
        """What of it decides the function of a model's weights; equal for equal functions."""
        return self

    @classmethod
    def where(cls, field_name: str | None = None) -> str:
        """The place of a field outside Megatron, for the documentation."""
        return f"`{cls.key()}`" if field_name is None else f"`{cls.key()}.{field_name}`"

    @classmethod
    def spelled(cls, field_name: str) -> str:
        """A field in errors: its JSON key and its flag."""
        return f"{cls.key()}.{field_name} ({cls.flag(field_name)})"

    def _require(self, field_name: str, holds: bool, remedy: str) -> None:
        """Reject the value of a field."""
        if not holds:
            value = getattr(self, field_name)
            raise ConfigError(f"{self.spelled(field_name)} {value!r}: {remedy}")


def did_you_mean(word: str, known: list[str]) -> str:
    """``"; did you mean 'layers'?"``, or the list of what is known when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
