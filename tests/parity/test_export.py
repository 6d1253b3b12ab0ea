"""Megatron's logits = the exported folder's = the naive reference's, for every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from megatron_plugins.export import mapping, verify
from megatron_plugins.export.reference_tensors import ReferenceTensors
from megatron_plugins.export.run import export
from tests.parity.conftest import CASES, Case
from torch_plugins import reference
from torch_plugins.export import folder_model
from torch_plugins.export.proof import VerificationError, with_all_experts

MODEL_TYPES = {
    "llama-gqa-tp2": "llama",
    "gpt2-pp2": "plugin_decoder",
    "gelu-partial-rope-tp2": "plugin_decoder",
    "interleaved-rope-wide-heads-tp2": "plugin_decoder",
    "squared-relu-no-positions-dp2": "plugin_decoder",
    "mup-pp2": "granite",
    "power-mup-pp2": "granite",
    "power-mup-ladder-tp2": "plugin_decoder",
    "rope-scaling-bf16-tp2": "llama",
    "numbered-layers-tp2": "llama",
    "ladder-vpp2": "plugin_decoder",
    "ladder-last2-tp2": "plugin_decoder",
    "cla-ladder-vpp2": "plugin_decoder",
    "cla-learned-tp2": "plugin_decoder",
    "cla-separate-mqa-tp2": "plugin_decoder",
    "experts-tp2": "plugin_decoder",
    "experts-gated-cla-pp2": "plugin_decoder",
    "experts-gated-tp2": "qwen2_moe",
    "w4a4-tp2": "llama",
    "w4a4-ladder-cla-pp2": "plugin_decoder",
    "desync-tp2": "plugin_decoder",
    "desync-gelu-tp2": "plugin_decoder",
    "ladder-spec-tp2": "plugin_decoder",
}


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_logits(
    name: str, checkpoints: Path, megatron: dict[str, Any], tmp_path: Path, without_megatron: None
) -> None:
    """From the checkpoint of any sharding, on the same random tokens, in fp32."""
    case = Case.open(checkpoints / name)
    model_type, verdict = export(checkpoints / name, tmp_path / "out")
    assert model_type == MODEL_TYPES[name]
    assert "naive reference" in verdict.against

    expected = megatron[name]
    limit = verify.tolerance(case.config, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = {name: x.float() for name, x in folder_tensors(tmp_path / "out").items()}
    assert config["vocab_size"] == expected.shape[-1] == case.config.vocab_size
    others = [
        folder_model.logits(tmp_path / "out", case.input_ids, all_experts=True),
        reference.logits(
            ReferenceTensors(case.checkpoint, case.config, None),
            with_all_experts(case.config),
            case.input_ids,
        ),
    ]
    if model_type != "qwen2_moe":  # whose names the reference does not know
        config["dense_moe"] = with_all_experts(case.config)["dense_moe"]
        others.append(reference.logits(tensors, config, case.input_ids))
    for other in others:
        assert (other - expected).abs().max().item() <= limit


def test_wrong_clips_are_no_export(
    checkpoints: Path, tmp_path: Path, without_megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips a tenth too wide: the weights are right, and what is quantized is not."""

    def wider(count: int) -> Any:
        return lambda clip: tuple(1.1 * clip for _ in range(count))

    monkeypatch.setattr(mapping, "_same_for", wider)
    with pytest.raises(VerificationError, match="quantized logits differ"):
        export(checkpoints / "w4a4-tp2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_power_mup_leaves_as_a_stock_granite_folder(
    checkpoints: Path, tmp_path: Path, without_megatron: None
) -> None:
    """With the multipliers of the preset, no section of ours and no code."""
    export(checkpoints / "power-mup-pp2", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 1 / 16,
        "logits_scaling": 4.0,
        "initializer_range": 0.1,
    }
    assert {name: config[name] for name in expected} == expected
    assert not [name for name in config if "mup" in name]
    assert not list((tmp_path / "out").glob("*.py"))


def test_features_and_dtype(checkpoints: Path, tmp_path: Path, without_megatron: None) -> None:
    """config.json names the ladder's layers; weights keep the checkpoint's dtype."""
    export(checkpoints / "ladder-last2-tp2", tmp_path / "ladder")
    config = json.loads((tmp_path / "ladder" / "config.json").read_text())
    assert config["ladder_residual"] == {"layers": "last:2"}
    assert (tmp_path / "ladder" / "modeling_plugin_decoder.py").exists()

    export(checkpoints / "rope-scaling-bf16-tp2", tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype for x in folder_tensors(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert not list((tmp_path / "bf16").glob("*.py"))


@pytest.mark.parametrize(("dtype", "kept"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_converted_weights_are_verified_as_written(
    dtype: str, kept: torch.dtype, checkpoints: Path, tmp_path: Path, without_megatron: None
) -> None:
    _, verdict = export(checkpoints / "llama-gqa-tp2", tmp_path / "out", dtype=dtype)
    assert verdict.equal
    assert {x.dtype for x in folder_tensors(tmp_path / "out").values()} == {kept}


def test_shards(checkpoints: Path, tmp_path: Path, without_megatron: None) -> None:
    """Several files and their index hold what one file would."""
    load = checkpoints / "llama-gqa-tp2"
    export(load, tmp_path / "one")
    export(load, tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = folder_tensors(tmp_path / "one"), folder_tensors(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_generates(checkpoints: Path, tmp_path: Path, without_megatron: None) -> None:
    export(checkpoints / "ladder-vpp2", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.randint(255, (1, 5))
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 9)
