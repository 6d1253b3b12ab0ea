"""Train the same small GPT twice with Megatron, standard and with Ladder Residual, on real text.

    make demo                         # or: python examples/ladder_residual/demo.py
    python examples/ladder_residual/demo.py --quick       # a toy, to see every step in a minute

Two processes, tensor parallel over gloo, no GPU. Everything is written below ``--output``.
``--resume`` keeps an arm that an earlier run finished with the same settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

from plot import plot_losses
from prepare_data import Corpus
from rich.console import Console
from rich.table import Table
from settings import ARMS, FULL, QUICK, TENSOR_PARALLEL, Settings
from training import HERE, DemoError, own_folder, run_logged, train
from training_log import History

OUTPUT = Path(__file__).resolve().parents[2] / "out" / "ladder_residual"
PROMPT = "def read_lines(path):\n    "


def prepare_data(settings: Settings, output: Path, console: Console) -> Corpus:
    """Run ``prepare_data.py``, which does nothing when its data is there already."""
    console.print("[bold]data[/bold] Python's standard library and language reference")
    command = [sys.executable, str(HERE / "prepare_data.py"), "--output", str(output / "data")]
    command += ["--vocab-size", str(settings.vocab_size)]
    if settings.documents:
        command += ["--documents", str(settings.documents)]
    with run_logged(command, output / "data.log"):
        pass
    corpus = Corpus.load(output / "data")
    console.print(
        f"  {corpus.documents} documents: {corpus.train_tokens:,} tokens for training, "
        f"{corpus.valid_tokens:,} held out; byte-level BPE of {corpus.vocab_size} entries\n"
        f"  each arm: {settings.parameters / 1e6:.1f} M parameters, {settings.layers} layers, "
        f"{settings.iterations} steps, {settings.tokens:,} tokens",
        highlight=False,
    )
    return corpus


def finished(arm: str, settings: Settings, corpus: Corpus, output: Path) -> History | None:
    """The arm's curves when an earlier run finished it with the same settings and data."""
    record = output / arm / "finished.json"
    if not record.exists() or json.loads(record.read_text()) != identity(settings, corpus):
        return None
    return History.load(output / arm / "history.json")


def identity(settings: Settings, corpus: Corpus) -> dict[str, object]:
    return {**dataclasses.asdict(settings), "corpus": corpus.fingerprint}


def train_arms(
    settings: Settings, corpus: Corpus, output: Path, resume: bool, console: Console
) -> dict[str, History]:
    """Both arms, one after the other, from the same seed over the same data."""
    runs: dict[str, History] = {}
    for arm, extra in ARMS.items():
        console.print(f"[bold]{arm}[/bold] {' '.join(extra)}", highlight=False)
        old = finished(arm, settings, corpus, output) if resume else None
        if old is None:
            runs[arm] = train(arm, settings, output / "data", output, console)
            record = json.dumps(identity(settings, corpus), indent=1)
            (output / arm / "finished.json").write_text(record + "\n")
        else:
            runs[arm] = old
            console.print("  kept from an earlier run")
    return runs


def export(output: Path, console: Console) -> Path:
    """Convert the ladder checkpoint to a Hugging Face folder; the exporter compares the logits."""
    folder = own_folder(output / "export")
    command = [sys.executable, "-m", "megatron_plugins.export_hf"]
    command += ["--load", str(output / "ladder" / "checkpoint"), "--output", str(folder / "hf")]
    command += ["--tokenizer", str(output / "data" / "tokenizer")]
    with run_logged(command, folder / "log.txt") as lines:
        for line in lines:
            if "logits" in line:
                console.print(f"  {line}", highlight=False)
    return folder / "hf"


def complete(folder: Path, prompt: str, new_tokens: int) -> str:
    """Reload the exported model with the Auto classes and sample a continuation of ``prompt``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import torch_plugins.hf  # noqa: F401  registers the decoder

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1234)
    tokens = tokenizer(prompt, return_tensors="pt")
    result = model.generate(
        **tokens, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_k=40
    )
    return tokenizer.decode(result[0], skip_special_tokens=True)


def summary(runs: dict[str, History]) -> Table:
    table = Table(title=f"Same seed, data and number of steps; TP={TENSOR_PARALLEL} on the CPU")
    for column in ("arm", "training loss", "validation loss", "step (ms)", "tokens/s"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, run in runs.items():
        table.add_row(
            arm,
            f"{run.final_loss:.3f}",
            f"{run.valid_losses[-1]:.3f}",
            f"{run.median_step_ms:.0f}",
            f"{run.tokens_per_second:,.0f}",
        )
    return table


def run(settings: Settings, output: Path, resume: bool, console: Console) -> None:
    """The whole demo.

    Raises:
        DemoError: a step failed; the message names its log.
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare_data(settings, output, console)
    runs = train_arms(settings, corpus, output, resume, console)
    title = (
        f"Megatron, TP={TENSOR_PARALLEL}: GPT of {settings.parameters / 1e6:.1f} M parameters, "
        f"{settings.tokens / 1e6:.2f} M tokens"
    )
    plot_losses(runs, title, output / "loss.png")

    console.print("[bold]export[/bold] the ladder checkpoint to Hugging Face format")
    folder = export(output, console)
    console.print("[bold]generate[/bold] with AutoModelForCausalLM, after the prompt")
    console.print(complete(folder, PROMPT, settings.sequence_length // 4), markup=False)

    console.print(summary(runs))
    gap = runs["ladder"].valid_losses[-1] - runs["standard"].valid_losses[-1]
    console.print(
        f"The losses are the result: {gap:+.3f} nats per token on held-out text for the ladder.\n"
        "The step times are no speed claim: on one machine an all-reduce costs next to nothing,\n"
        "so there is little to hide. `make bench-ladder` measures the overlap over slower links.",
        highlight=False,
    )
    for what, path in {
        "loss curves": output / "loss.png",
        "Hugging Face model": folder,
        "Megatron checkpoints": output / "{standard,ladder}" / "checkpoint",
        "Megatron's logs": output / "{standard,ladder}" / "log.txt",
    }.items():
        console.print(f"  {what:<21}{path}", highlight=False)
    console.print(f"{time.monotonic() - started:.0f} seconds in all", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a toy model, a few steps")
    parser.add_argument("--seed", type=int, default=FULL.seed, help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep arms already finished")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if arguments.quick and output == OUTPUT:
        output = OUTPUT.with_name(OUTPUT.name + "_quick")
    console = Console(soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Megatron's processes end too
    settings = dataclasses.replace(QUICK if arguments.quick else FULL, seed=arguments.seed)
    try:
        run(settings, output, arguments.resume, console)
    except DemoError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
