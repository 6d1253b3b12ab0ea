"""What the modules and collectives of a ladder do, in order; for ladder_cases.py, and the order
that hides them."""

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


def assert_gradients_are_hidden(events: list[str], first: int = 1) -> None:
    """The reduction of module n's input is launched after dgrad, and all weights of n - 1 have
    their gradients before it is waited for; ``first``: module whose input has the last one."""
    for n in range(first, 8):
        launched = events.index(f"launch gradient of its input {n}")
        waited = events.index(f"wait gradient of its input {n}")
        own = [events.index(f"{what} {n}") for what in ("row", "column")]
        before = [events.index(f"{what} {n - 1}") for what in ("row", "column")]
        assert own[0] < launched < own[1] < min(before) < max(before) < waited
    assert len([event for event in events if event.startswith("wait")]) == 8 - first + 1


def assert_modules_begin_under_the_one_before(forward: list[str], backward: list[str]) -> None:
    """Sequence parallel: reduce-scatter n is launched before module n + 1 starts; all-gather n + 2
    behind it, before module n + 1 has ended. The mirror of it in the backward."""
    for n in range(6):
        chain = [f"launch output {n}", f"start {n + 1}", f"wait output {n}"]
        chain += [f"launch its input {n + 2}", f"launch output {n + 1}", f"start {n + 2}"]
        chain += [f"wait its input {n + 2}"]
        places = [forward.index(event) for event in chain if event != "launch output 7"]
        assert places == sorted(places)
    for n in range(2, 8):
        chain = [f"launch gradient of its input {n}", f"row {n - 1}"]
        chain += [f"wait gradient of its input {n}", f"launch backward {n - 2}", f"column {n - 1}"]
        chain += [f"wait backward {n - 2}", f"row {n - 2}"]
        places = [backward.index(event) for event in chain]
        assert places == sorted(places)
