"""What the modules and collectives of a ladder do, in order; for ladder_cases.py."""

from __future__ import annotations

from typing import Any

from megatron_plugins import reduction


def notes(model: Any) -> tuple[list[str], type[reduction.InFlight]]:
    """A list of what happens in ``model`` from now on, and the collective that it is to use:
    modules that start, weights that have their gradients, collectives that are launched and waited
    for. Modules are numbered through the model: in a GPT, the attention of layer l is 2 l, the MLP
    2 l + 1."""
    events: list[str] = []
    numbers: dict[str, int] = {}
    for index, layer in enumerate(model.decoder.layers):
        parts = (
            ("attention", layer.self_attention, "linear_qkv", "linear_proj"),
            ("mlp", layer.mlp, "linear_fc1", "linear_fc2"),
        )
        for name, module, column, row in parts:
            if not hasattr(module, column):  # a layer of a hybrid stack has one of them
                continue
            n = len(numbers)
            numbers[f"layer {index}, {name}"] = n
            module.register_forward_pre_hook(lambda *_, n=n: events.append(f"start {n}"))
            for what, linear in (("column", column), ("row", row)):
                getattr(module, linear).weight.register_post_accumulate_grad_hook(
                    lambda _, what=what, n=n: events.append(f"{what} {n}")
                )

    class Noted(reduction.InFlight):
        """``layer 1, mlp, backward`` is said as ``backward 3``."""

        @property
        def said(self) -> str:
            layer, module, *rest = self.what.split(", ")
            n = numbers[f"{layer}, {module}"]
            return f"{rest[0] if rest else 'output'} {n}"

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "work" and value is not None:
                events.append(f"launch {self.said}")
            super().__setattr__(name, value)

        def wait(self) -> None:
            if self.work is not None:
                events.append(f"wait {self.said}")
            super().wait()

    return events, Noted
