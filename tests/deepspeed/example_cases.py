"""Run the example scripts, as they are, with every JSON of the examples, one after the other.

Started by test_examples.py with a text, a folder for what the scripts save, and a number of steps;
a line of the output stands before each run's.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from engines import leave

EXAMPLES = Path(__file__).parents[2] / "examples"
FEATURES = {"together": "deepspeed", "ladder": "ladder_residual"}
FEATURES |= {"sharing": "cross_layer_attention", "power": "power_lr"}
FEATURES |= {"experts": "dense_moe", "four bits": "w4a4"}


def run(name, script, *words):
    print(f"== {name}", flush=True)
    sys.argv = [script, *map(str, words)]
    runpy.run_path(str(EXAMPLES / "deepspeed" / script))["main"]()


def bare(text, folder, steps):
    """``deepspeed.initialize``, and a run that goes on from what it saved."""
    small = ("--width", 16, "--text", text)
    for name, feature in FEATURES.items():
        settings = ("--deepspeed_config", EXAMPLES / feature / "ds_config.json", *small)
        save = folder / name
        run(name, "train_deepspeed.py", *settings, "--steps", steps, "--save", save)
    more = ("--steps", 2 * steps, "--load", folder / "together")
    settings = ("--deepspeed_config", EXAMPLES / "deepspeed" / "ds_config.json", *small)
    run("together, resumed", "train_deepspeed.py", *settings, *more)


def trainer(text, folder):
    """Hugging Face's Trainer; Power LR's JSON for it is the one with "auto"."""
    small = ("--text", text, "--per_device_train_batch_size", 8)
    small += ("--report_to", "none", "--save_strategy", "no", "--use_cpu", "--disable_tqdm", True)
    for name, feature in FEATURES.items():
        json_file = "ds_config_auto.json" if name == "power" else "ds_config.json"
        rate = 0.01 if name in ("power", "together") else 0.003
        steps = 24 if name == "power" else 2  # its last phase has 20
        settings = ("--deepspeed", EXAMPLES / feature / json_file, "--learning_rate", rate)
        settings += ("--max_steps", steps)
        output = folder / f"{name}, Trainer"
        run(f"{name}, Trainer", "train_hf.py", *small, *settings, "--output_dir", output)
        AcceleratorState._reset_state(True)


def main(text, folder, steps):
    bare(text, folder, steps)
    trainer(text, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    leave()
