"""What the modules and collectives of a ladder do, in order; for ladder_cases.py."""

from __future__ import annotations

from typing import Any

from megatron_plugins import reduction


def notes(model: Any) -> tuple[list[str], type[reduction.InFlight]]:
    """A list of what happens in ``model`` from now on, and the collective that it is to use:
    modules that start, weights that have their gradients, collectives that are launched and waited
    for. Module 2 l is the attention of layer l, and 2 l + 1 its MLP."""
    events: list[str] = []
    for index, layer in enumerate(model.decoder.layers):
        parts = (
            (layer.self_attention, "linear_qkv", "linear_proj"),
            (layer.mlp, "linear_fc1", "linear_fc2"),
        )
        for n, (module, column, row) in enumerate(parts, 2 * index):
            module.register_forward_pre_hook(lambda *_, n=n: events.append(f"start {n}"))
            for what, name in (("column", column), ("row", row)):
                getattr(module, name).weight.register_post_accumulate_grad_hook(
                    lambda _, what=what, n=n: events.append(f"{what} {n}")
                )

    class Noted(reduction.InFlight):
        """``layer 1, mlp, backward`` is said as ``backward 3``."""

        @property
        def said(self) -> str:
            layer, module, *rest = self.what.split(", ")
            n = 2 * int(layer.removeprefix("layer ")) + (module == "mlp")
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
