"""Checkpoints of many small models, and what Megatron itself computes with them.

Both are made once for all tests, each by one start of Megatron.
"""

from __future__ import annotations

import json
import shlex
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plugins.export import verify
from megatron_plugins.export.arguments import decoder_config
from megatron_plugins.export.checkpoint import COMMON_FILE, Checkpoint, find_iteration
from megatron_plugins.export.tokenizer import Tokenizer, vocabulary
from tests.megatron.harness import train
from tests.parity import llama_folders

LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights "
)
TP2 = "--tensor-model-parallel-size 2 "
PP2 = "--pipeline-model-parallel-size 2 "
MQA = "--group-query-attention --num-query-groups 1 "
GQA = "--group-query-attention --num-query-groups 2 "

CASES = {
    "llama-gqa-tp2": LLAMA + TP2 + GQA,
    "gpt2-pp2": PP2,
    "gelu-partial-rope-tp2": TP2 + "--position-embedding-type rope --rotary-percent 0.5 "
    "--no-bias-gelu-fusion",
    "interleaved-rope-wide-heads-tp2": LLAMA + TP2 + GQA + "--rotary-interleaved --add-qkv-bias "
    "--rotary-percent 0.5 --kv-channels 24",
    "squared-relu-no-positions-dp2": "--squared-relu --position-embedding-type none "
    "--untie-embeddings-and-output-weights --no-bias-gelu-fusion",
    "mup-pp2": LLAMA + PP2 + "--use-mup --mup-base-hidden-size 32 --mup-embedding-mult 3",
    "power-mup-pp2": LLAMA + PP2 + GQA + "--power-mup-preset powerlm-3b --mup-base-hidden-size 16",
    "power-mup-ladder-tp2": LLAMA + TP2 + "--power-mup-residual-multiplier 0.4 --ladder-residual "
    "--mup-base-hidden-size 32 --mup-output-mult 0.3 --mup-base-head-dim 4",
    "rope-scaling-bf16-tp2": LLAMA + TP2 + "--use-rope-scaling --bf16",
    "numbered-layers-tp2": LLAMA + TP2 + "--moe-layer-freq [0,0,0,0]",
    "ladder-vpp2": LLAMA + PP2 + "--num-layers-per-virtual-pipeline-stage 1 --ladder-residual",
    "ladder-last2-tp2": TP2 + "--position-embedding-type rope --ladder-residual "
    "--ladder-layers last:2",
    "cla-ladder-vpp2": LLAMA + PP2 + GQA + "--pipeline-model-parallel-layout Et|t*2|t|L "
    "--cla-pattern 0,1,1,3 --ladder-residual",
    "cla-learned-tp2": TP2 + "--cla-sharing-factor 3 --qk-layernorm",
    "cla-separate-mqa-tp2": LLAMA + TP2 + MQA + "--cla-sharing-factor 2 --cla-kv-norm separate "
    "--qk-layernorm --rotary-interleaved --rotary-percent 0.5 --add-qkv-bias",
    "experts-tp2": LLAMA.replace("--swiglu ", "") + TP2 + "--dsmoe-num-experts 4 "
    "--dsmoe-ffn-hidden-size 24 --dsmoe-attention-experts 2 --dsmoe-router-hidden-size 16 "
    "--ladder-residual --dsmoe-inference top-k --dsmoe-top-k 2",
    "experts-gated-cla-pp2": LLAMA + PP2 + GQA + "--dsmoe-gated --dsmoe-num-experts 4 "
    "--dsmoe-ffn-hidden-size 24 --dsmoe-router linear --cla-sharing-factor 2",
    "experts-gated-tp2": LLAMA + TP2 + GQA + "--dsmoe-gated --dsmoe-num-experts 4 "
    "--dsmoe-ffn-hidden-size 24 --dsmoe-router linear --dsmoe-inference top-k --dsmoe-top-k 2",
    "w4a4-tp2": LLAMA + TP2 + GQA + "--w4a4",
    "w4a4-ladder-cla-pp2": PP2 + "--w4a4 "
    "--cla-sharing-factor 2 --cla-kv-norm separate --ladder-residual --w4a4-symmetric "
    "--w4a4-weight-bits 4 --w4a4-modules !*linear_fc1,!*.3.* --position-embedding-type rope "
    "--no-gradient-accumulation-fusion",
    "desync-tp2": LLAMA + TP2 + GQA + "--desync-pattern 11,00,01,00",
    "desync-gelu-tp2": TP2 + "--disable-bias-linear --desync-pattern 3x "
    "--position-embedding-type rope --add-qkv-bias --qk-layernorm",
    "ladder-spec-tp2": LLAMA + TP2 + "--spec megatron_plugins.specs ladder_gpt_layer_spec",
}
"""Name -> flags, on top of ``tests.megatron.harness.TINY``: 4 layers, width 64, 255 tokens."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one ``--save`` folder per case. Not to be changed; see :func:`checkpoint`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = {name: shlex.split(flags) for name, flags in CASES.items()}
    script = Path(__file__).with_name("save_checkpoints.py")
    train(
        "--save",
        folder,
        processes=2,
        script=script,
        environment={"CASES": json.dumps(cases)},
    )
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one Hugging Face folder per kind of ``llama_folders.KINDS``. Not to be
    changed."""
    place = tmp_path_factory.mktemp("folders")
    llama_folders.make(place)
    return place


@dataclass
class Case:
    """One checkpoint, read once."""

    checkpoint: Checkpoint
    config: Any

    @classmethod
    def open(cls, load: Path) -> Case:
        checkpoint = Checkpoint(find_iteration(load))
        padded = checkpoint.tensors["embedding.word_embeddings.weight"][0]
        size, _ = vocabulary(checkpoint.args, padded, Tokenizer())
        return cls(checkpoint, decoder_config(checkpoint.args, size, "float32"))

    @property
    def input_ids(self) -> torch.Tensor:
        return verify.random_ids(self.config)


@pytest.fixture(scope="session")
def megatron(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Logits of Megatron's own model for every case, on ``Case.input_ids``."""
    place = tmp_path_factory.mktemp("megatron")
    for name in CASES:
        case = Case.open(checkpoints / name)
        answer = place / f"{name}.pt"
        request = verify.megatron_request(
            case.checkpoint, case.config, case.input_ids, None, answer
        )
        (place / f"{name}.json").write_text(json.dumps(request))
    done = verify.ask_megatron(*(place / f"{name}.json" for name in CASES))
    assert done.returncode == 0, done.stderr
    found = {name: torch.load(place / f"{name}.pt") for name in CASES}
    quantized = {name: answer["quantized"] for name, answer in found.items()}
    return {
        name: answer["logits"] if quantized[name] is None else quantized[name]
        for name, answer in found.items()
    }


@pytest.fixture
def without_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification takes the reference, which needs no start of Megatron."""
    monkeypatch.setattr(verify, "_installed", lambda module: False)


@pytest.fixture
def checkpoint(checkpoints: Path, tmp_path: Path) -> Path:
    """A ``--save`` folder of its own, for tests that change it."""
    return Path(shutil.copytree(checkpoints / "llama-gqa-tp2", tmp_path / "checkpoint"))


def plain_arguments(folder: Path) -> Namespace:
    """The saved arguments that can be pickled without Megatron."""
    args = vars(Checkpoint(folder).args)
    return Namespace(**{name: value for name, value in args.items() if plain(value)})


def change_arguments(load: Path, **changes: Any) -> None:
    """Rewrite the saved arguments, as ``common.pt``, where Megatron up to 0.18 keeps them."""
    folder = find_iteration(load)
    args = plain_arguments(folder)
    vars(args).update(changes)
    torch.save({"args": args, "iteration": 1}, folder / COMMON_FILE)


def plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | type(None) | torch.dtype)


class Evil:
    """Creates ``marker`` when it is unpickled freely."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)
