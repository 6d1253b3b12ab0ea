"""Optimizers and parameter lists follow a converted model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch_plugins.hf.convert import Conversion


def follow(conversion: Conversion, engine_arguments: dict[str, Any]) -> None:
    """Take removed parameters out of what the script hands to the engine, and put each added one
    behind the one it is like, in the same group.

    An added parameter whose like is in no group stays out. Lists and groups are edited in place,
    as DeepSpeed does after its own conversions; anything else that yields parameters becomes a
    list. A callable optimizer is given the edited parameters by the engine.
    """
    edit = _Edit(conversion)
    optimizer: Any = engine_arguments.get("optimizer")
    if hasattr(optimizer, "param_groups"):
        edit.groups(optimizer.param_groups)
        for parameter in conversion.removed.values():
            optimizer.state.pop(parameter, None)
    parameters = engine_arguments.get("model_parameters")
    if parameters is None:
        return
    if not isinstance(parameters, list):
        parameters = engine_arguments["model_parameters"] = list(parameters)
    if parameters and isinstance(parameters[0], dict):
        edit.groups(parameters)
    else:
        edit.members(parameters)


class _Edit:
    """What a conversion does to a list of parameters."""

    def __init__(self, conversion: Conversion) -> None:
        self.removed = {id(parameter) for parameter in conversion.removed.values()}
        self.behind: dict[int, list[nn.Parameter]] = {}
        for name, like in conversion.likes.items():
            self.behind.setdefault(id(like), []).append(conversion.added[name])

    def groups(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            if not isinstance(group["params"], list):
                group["params"] = list(group["params"])
            self.members(group["params"])

    def members(self, members: list[nn.Parameter]) -> None:
        present = {id(parameter) for parameter in members}
        result = []
        for parameter in members:
            if id(parameter) not in self.removed:
                result.append(parameter)
            for added in self.behind.get(id(parameter), []):
                if id(added) not in present:  # a lazy iterable has it already
                    result.append(added)
        members[:] = result
