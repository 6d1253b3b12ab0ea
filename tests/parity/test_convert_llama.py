"""Llama and Granite folders become Megatron checkpoints, Megatron trains from them, and back."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_plugins import convert, power_mup
from megatron_plugins.arguments import features_of
from megatron_plugins.export import verify
from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
from megatron_plugins.export.reference_tensors import ReferenceTensors
from megatron_plugins.from_hf.arguments import arguments
from tests.megatron.harness import train
from tests.parity.conftest import Case
from tests.parity.llama_folders import KINDS, MULTIPLIERS, SIZES, save
from tests.parity.test_export import folder_tensors
from torch_plugins import reference
from torch_plugins.config import LadderResidual, PowerMup
from torch_plugins.export.folder import Folder
from torch_plugins.export.layerwise import folder_logits
from torch_plugins.hf import PluginDecoderConfig


@pytest.fixture(scope="module")
def converted(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both as checkpoints with a partial ladder."""
    place = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        words = ("--from", kind, folders / kind, "--to", place / kind, "--ladder-layers", "last:2")
        assert convert.main([str(word) for word in words]) == 0
    return place


ATTENTION = [f"self_attention.{name}" for name in ("core_attention", "linear_qkv", "linear_proj")]
"""What has an extra state in the layers of TransformerEngine's spec, beside the MLP."""


def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    """transformers' own, all at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(ids).logits


def without_ladder(load: Path) -> Case:
    case = Case.open(load)
    case.checkpoint.args.ladder_residual = False
    case.config.ladder_residual = None
    return case


def test_what_is_written(folders: Path, converted: Path) -> None:
    """Tensors as another reader finds them, layers stacked in parts, arguments as of a run."""
    for kind in KINDS:
        case, source = without_ladder(converted / kind), folder_tensors(folders / kind)
        found = ReferenceTensors(case.checkpoint, case.config, None)
        assert len(source) == 3 * (kind == "llama") + 2 * (kind == "granite") + 9 * 4
        for name, tensor in source.items():
            assert torch.equal(found[name], tensor.float()), name
        key = "decoder.layers.mlp.linear_fc1.weight"
        stored = case.checkpoint._metadata.state_dict_metadata[key]
        assert [tuple(chunk.sizes) for chunk in stored.chunks] == [(1, 192, 64)] * 4
        assert case.checkpoint.tensors["embedding.word_embeddings.weight"][0] == 301
    llama, granite = (Checkpoint(find_iteration(converted / kind)) for kind in KINDS)
    ladder = {"ladder_residual": LadderResidual("last:2")}
    assert features_of(llama.args) == ladder
    assert features_of(granite.args) == ladder | {"power_mup": PowerMup(residual_multiplier=0.22)}
    assert (llama.args.bf16, granite.args.bf16) == (True, False)
    assert llama.dtype("output_layer.weight") == torch.bfloat16
    assert "output_layer.weight" not in granite.tensors
    states = {state.partition("._extra_state/")[0] for state in llama.states}
    assert states == {"decoder.final_layernorm"} | {
        f"decoder.layers.{module}" for module in ("mlp.linear_fc1", "mlp.linear_fc2", *ATTENTION)
    }
    assert (llama.args.kv_channels, llama.args.num_query_groups) == (24, 2)
    assert (llama.args.use_rope_scaling, llama.args.layernorm_epsilon) == (True, 1e-6)
    assert (granite.args.mup_base_hidden_size, granite.args.mup_output_mult) == (16, 1.0)


def test_megatron_computes_the_same(folders: Path, converted: Path, tmp_path: Path) -> None:
    """Its own model and loader, without the ladder; so does a forward layer by layer."""
    requests = []
    for kind in KINDS:
        case = without_ladder(converted / kind)
        answer = tmp_path / f"{kind}.pt"
        request = verify.megatron_request(
            case.checkpoint, case.config, case.input_ids, None, answer
        )
        requests.append(tmp_path / f"{kind}.json")
        requests[-1].write_text(json.dumps(request))
    done = verify.ask_megatron(*requests)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        case = without_ladder(converted / kind)
        expected = stock_logits(folders / kind, case.input_ids)
        limit = verify.tolerance(case.config, expected)
        found = torch.load(tmp_path / f"{kind}.pt")["logits"]
        assert found.shape == expected.shape
        assert (found - expected).abs().max().item() <= limit
        alone = folder_logits(Folder(folders / kind), case.input_ids)
        assert torch.equal(alone, expected)


@pytest.mark.parametrize(
    "multipliers",
    [(12.0, 0.22, 1 / 16, 4.0), (1.0, 1.0, 0.25, 3.0), (2.5, 1.0, 0.07, 0.5), (1.0, 0.5, 0.25, 49)],
)
def test_multipliers(multipliers: tuple[float, ...]) -> None:
    """Whatever they are, the exporter finds them again; the width is that of a base model where the
    logits' is a whole number."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    given = dict(zip((*names, "logits_scaling"), multipliers, strict=True))
    config = PluginDecoderConfig(
        **SIZES, **given, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    args = arguments(config, torch.float32)
    assert power_mup.multipliers(args) == pytest.approx(given, rel=1e-15, abs=0)
    scaling = given["logits_scaling"]
    assert args.mup_base_hidden_size == (64 / scaling if scaling in (4, 0.5) else None)


RUN = """
    --micro-batch-size 2 --global-batch-size 4 --train-iters 20 --exit-interval 1 --lr 0
    --weight-decay 0 --lr-decay-style constant --eval-interval 1000 --eval-iters 0
    --log-interval 1 --save-interval 1000 --tokenizer-type NullTokenizer
    --mock-data --num-workers 0 --use-cpu-initialization --seq-length 32 --use-checkpoint-args
    --make-vocab-size-divisible-by 1
"""
"""One iteration that changes nothing; the model is the checkpoint's."""
TOKENS = 300 if version("megatron-core").startswith("0.17") else 301
"""0.17 adds one."""


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("llama", "--tensor-model-parallel-size 2 --use-rope-scaling --norm-epsilon 1e-6", ""),
        ("granite", "--pipeline-model-parallel-size 2 --norm-epsilon 1e-6", "residual x 0.22"),
    ],
)
def test_megatron_trains_from_it_and_back(
    kind: str,
    flags: str,
    said: str,
    folders: Path,
    converted: Path,
    tmp_path: Path,
    without_megatron: None,
) -> None:
    """At another parallel size, with the ladder that the checkpoint has; what Megatron saves is,
    without the ladder, the folder bit for bit. Of 301 tokens two ranks make 302."""
    run = train(
        *flags.split(),
        *("--vocab-size", TOKENS),
        *("--load", converted / kind, "--save", tmp_path / "saved"),
        processes=2,
        tiny=shlex.split(RUN),
    )
    assert list(run.losses) == [1]
    assert "ladder-residual: 2 of 4 layers" in run.output
    assert said in run.output
    assert "loading release distributed checkpoint" in run.output

    back = ("--from", "megatron", tmp_path / "saved", "--to", tmp_path / "back")
    assert convert.main([*map(str, back), "--ladder-layers", "none"]) == 0
    expected, found = folder_tensors(folders / kind), folder_tensors(tmp_path / "back")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (folders / kind, tmp_path / "back")
    ]
    for name in (*SIZES, *(MULTIPLIERS if kind == "granite" else ()), "rope_parameters"):
        assert configs[0][name] == configs[1][name], name
    assert configs[1]["architectures"] == configs[0]["architectures"]
    ids = without_ladder(converted / kind).input_ids
    assert torch.equal(stock_logits(folders / kind, ids), stock_logits(tmp_path / "back", ids))


def test_the_ladder_goes_back_with_it(
    converted: Path, tmp_path: Path, without_megatron: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--from", "megatron", converted / "llama", "--to", tmp_path / "back")
    assert convert.main([str(word) for word in words]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["ladder_residual"] == {"layers": "last:2"}
    assert "as plugin_decoder" in capsys.readouterr().out


def test_cross_layer_attention_comes_second(converted: Path, tmp_path: Path) -> None:
    words = ("--load", converted / "llama", "--save", tmp_path / "new", "--cla-sharing-factor", 2)
    assert convert.main([str(word) for word in words]) == 0
    new, old = Case.open(tmp_path / "new"), Case.open(converted / "llama")
    assert features_of(new.checkpoint.args).keys() == {"ladder_residual", "cross_layer_attention"}
    shared = old.config.to_dict() | {"cross_layer_attention": {"sharing_factor": 2}}
    found, expected = (
        reference.logits(ReferenceTensors(c.checkpoint, c.config, None), section, old.input_ids)
        for c, section in ((new, new.config.to_dict()), (old, shared))
    )
    assert torch.equal(found, expected)


def peak(action: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grows meanwhile, at most."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])  # type: ignore[index]

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free would be used first, and not seen
    clear.write_text("5")  # the peak is forgotten
    before = kilobytes("VmRSS")
    action()
    return (kilobytes("VmHWM") - before) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Linux alone tells")
def test_memory_of_one_layer(folders: Path, tmp_path: Path) -> None:
    """Weights of 76 MB in 24 layers, written and compared."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 24}
    config = LlamaConfig(**SIZES | sizes, tie_word_embeddings=True)
    source = save(config, tmp_path / "source")
    total = (source / "model.safetensors").stat().st_size

    def written(source: Path, name: str) -> None:
        words = ("--from", "llama", source, "--to", tmp_path / name)
        assert convert.main([str(word) for word in words]) == 0

    written(folders / "llama", "warm")
    grown = peak(lambda: written(source, "new"))
    assert total > 75e6
    assert grown < total / 2, f"{grown / 1e6:.0f} MB of {total / 1e6:.0f} MB"
