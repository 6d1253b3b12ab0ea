"""train_gpt.py, which also writes how the optimizer treats each parameter, and its initial values.

With ``GROUPS=path``: a JSON object, from the name of a parameter in the model to the ``lr``,
``min_lr``, ``eps`` and ``wd_mult`` of its group, and to the ``mean``, ``std`` and ``size`` of its
values before the first step.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model
from megatron.training import training

upstream = training.setup_model_and_optimizer


@functools.wraps(upstream)
def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
    built = upstream(*args, **kwargs)
    chunks, optimizer, _ = built
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in unwrap_model(chunks)[0].named_parameters():
        group = groups[id(parameter)]
        found[name] = {
            "lr": group["max_lr"],
            "min_lr": group["min_lr"],
            "eps": group["eps"],
            "wd_mult": group["wd_mult"],
            "mean": parameter.mean().item(),
            "std": parameter.std().item(),
            "size": parameter.numel(),
        }
    Path(os.environ["GROUPS"]).write_text(json.dumps(found))
    return built


if __name__ == "__main__":
    training.setup_model_and_optimizer = setup_model_and_optimizer
    runpy.run_path(str(Path(__file__).with_name("train_gpt.py")), run_name="__main__")
