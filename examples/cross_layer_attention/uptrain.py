"""A trained model becomes CLA2: what should its producers' keys and values start from?

    python examples/cross_layer_attention/uptrain.py            # minutes on one core
    python examples/cross_layer_attention/uptrain.py --quick    # a toy, to see every step

Trains an MQA model and converts copies of it with each ``kv_init`` of the DeepSpeed JSON, which is
``--kv`` of ``python -m megatron_plugins.convert``: ``first`` keeps a producer's own projections,
``mean`` averages them over its group. Each copy, and the model as it is for comparison, trains on
for a fraction of the steps, on the same batches. Prints the validation losses; writes
``uptrain.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from arms import ARMS, QUICK, Settings, build, fit, prepare_tokens, validation_loss

OUTPUT = Path(__file__).resolve().parents[2] / "out" / "cross_layer_attention_uptrain"
RATE = 3e-3
"""Peak of the first training."""
FRACTIONS = (0.05, 0.2)
"""Of the first training's steps, for the second; each starts again from the converted model."""
AGAIN = 0.5
"""Peak of the second training, over the first one's."""
STARTS = ("stock", "first", "mean")


def started(model: Any, start: str) -> Any:
    """A copy of the trained model, converted unless ``start`` is stock."""
    from torch_plugins.config import CrossLayerAttention
    from torch_plugins.hf.convert import convert

    result = copy.deepcopy(model)
    if start != "stock":
        convert(result, [CrossLayerAttention(sharing_factor=2)], kv_init=start)
    return result


def of_seed(settings: Settings, seed: int, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The losses of every start: at once, and after each fraction."""
    import torch

    torch.manual_seed(seed)
    model = build(settings, ARMS["MQA"])
    fit(settings, model, RATE, seed, data["train"])
    for start in STARTS:
        for fraction in (0.0, *FRACTIONS):
            again = replace(settings, steps=round(fraction * settings.steps))
            trained = started(model, start)
            fit(again, trained, AGAIN * RATE, seed + 1000, data["train"])
            loss = validation_loss(settings, trained, data["valid"])
            print(f"seed {seed}  {start:<5}  after {again.steps:>3} steps: {loss:.4f}", flush=True)
            yield {"seed": seed, "start": start, "fraction": fraction, "loss": loss}


def print_table(rows: list[dict[str, Any]], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds = sorted({row["seed"] for row in rows})
    table = Table(title=f"validation loss, mean of {len(seeds)} seeds (by seed)")
    table.add_column("start")
    for fraction in (0.0, *FRACTIONS):
        table.add_column(f"{fraction:.0%} of {settings.steps} steps", justify="right")
    for start in STARTS:
        cells = []
        for fraction in (0.0, *FRACTIONS):
            found = {
                r["seed"]: r["loss"]
                for r in rows
                if (r["start"], r["fraction"]) == (start, fraction)
            }
            by_seed = " ".join(f"{found[seed]:.3f}" for seed in seeds)
            cells.append(f"{mean(found.values()):.3f} ({by_seed})")
        table.add_row(start, *cells)
    console = Console(soft_wrap=True, width=max(120, Console().width))  # also into a file
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a toy model, a few steps")
    arguments = parser.parse_args()
    settings = replace(QUICK, steps=20) if arguments.quick else Settings()
    import torch

    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = torch.load(prepare_tokens(settings, arguments.output))
    rows = [row for seed in settings.seeds for row in of_seed(settings, seed, data)]
    result = {"settings": asdict(settings), "rows": rows}
    (arguments.output / "uptrain.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows, settings)
    print(f"written: {arguments.output}/uptrain.json")


if __name__ == "__main__":
    main()
