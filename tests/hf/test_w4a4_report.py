"""The report's numbers against the definitions, taken from the whole model at once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.hf.w4a4_models import ASYMMETRIC, ids, llama, plugin, save
from torch_plugins.w4a4 import W4A4Linear, load_quantized
from torch_plugins.w4a4.cli import main

CALIBRATION = ("--seq-length", 24, "--calibration")
NAME = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model with clips, and one without whose channel 5 stands out; both quantized."""
    work = tmp_path_factory.mktemp("report")
    save(llama, ASYMMETRIC, work / "clips")
    save(llama, None, work / "plain")
    model = AutoModelForCausalLM.from_pretrained(work / "plain")
    model.model.layers[1].post_attention_layernorm.weight.data[5] *= 40
    model.save_pretrained(work / "plain")
    save_file({"input_ids": ids()}, work / "ids.safetensors")
    for name, kind in (("clips", "learned"), ("plain", "none")):
        given = (*CALIBRATION, work / "ids.safetensors", "--activations", kind)
        run("quantize", work / name, work / f"{name}-4", *given)
    return work


def run(*arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def rows(work):
    def report(name, *options):
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) as out:
            given = (*CALIBRATION, work / "ids.safetensors", "--json", *options)
            run("report", work / name, *given)
        return {row["layer"]: row for row in json.loads(out.getvalue())["layers"]}

    return report


@torch.no_grad()
def test_numbers_are_those_of_the_definitions(work, rows):
    found = rows("clips", "--against", work / "clips-4")
    model = AutoModelForCausalLM.from_pretrained(work / "clips").eval()
    linear, seen = model.get_submodule(NAME), []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(input_ids=ids())
    x, weight = torch.cat(seen), linear.weight
    row = found[NAME]

    z = x - x.mean(-1, keepdim=True)
    kurtosis = (z**4).mean(-1) / ((z**2).mean(-1) ** 2 + 1e-6)
    assert row["input_kurtosis"] == pytest.approx(kurtosis.mean().item(), rel=1e-4)
    sizes = x.abs().amax(0)
    assert row["input_outlier"] == pytest.approx((sizes.max() / sizes.median()).item(), rel=1e-4)
    assert row["input_range"] == pytest.approx([x.min().item(), x.max().item()], rel=1e-4)
    high, low = linear.input_quantizer.clips()
    assert row["clips"] == pytest.approx([low.item(), high.item()], rel=1e-5)

    scale = weight.abs().amax(1, keepdim=True) / 7.5
    nearest = (weight / scale).round().clamp(-8, 7) * scale
    packed = load_quantized(work / "clips-4", dtype=torch.float32).get_submodule(NAME)
    assert isinstance(packed, W4A4Linear)
    quantized = linear.input_quantizer(x)
    ratio = lambda a, b: ((a - b).norm() / b.norm()).item()  # noqa: E731
    for way, other in (("nearest", nearest), ("quantized", packed.weight)):
        errors = row["errors"][way]
        assert errors["inputs"] == pytest.approx(ratio(quantized, x), rel=1e-3)
        assert errors["weights"] == pytest.approx(ratio(other, weight), rel=1e-4)
        out = ratio(quantized @ other.T, x @ weight.T)
        assert errors["outputs"] == pytest.approx(out, rel=1e-3)


def test_an_outlier_and_the_gain_of_gptq_are_seen(work, rows):
    found = rows("plain", "--against", work / "plain-4")
    outliers = {name: row["input_outlier"] for name, row in found.items()}
    above = [name for name, ratio in outliers.items() if ratio > 10]
    assert above == [f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up")]
    assert all(found[name]["input_kurtosis"] > 10 for name in above)
    assert found[above[0]]["clips"] is None
    assert all(row["errors"]["quantized"]["inputs"] == 0 for row in found.values())
    ways = ("nearest", "quantized")
    nearest, gptq = (sum(row["errors"][w]["outputs"] for row in found.values()) for w in ways)
    assert gptq < 0.8 * nearest


def test_table_and_picture(work, capsys, tmp_path):
    save(plugin, None, tmp_path / "m")
    run("report", tmp_path / "m", "--tokens", 64, "--output", tmp_path / "r.png")
    out = capsys.readouterr().out
    assert "20 linear layers" in out or "24 linear layers" in out
    assert "3.mlp.down_proj" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        run("report", work / "plain", "--tokens", 64, "--output", tmp_path / "no/r.png")
    assert "--output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("report", work / "plain", "--tokens", 64, "--against", work / "clips")
    assert "is not that of" in capsys.readouterr().err
