"""A saved folder carries its code: it loads where our packages cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from torch_plugins.hf import PluginDecoderModel, write_remote_code
from torch_plugins.hf.remote_code import SOURCES

CODE = {Path(source).name for source in SOURCES}
LOAD_WITHOUT_OUR_PACKAGES = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch_plugins", "megatron_plugins"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, work = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = load_file(f"{work}/ids.safetensors")["ids"]
generated = model.generate(ids, max_new_tokens=4, do_sample=False)
model.save_pretrained(f"{work}/again")
again = AutoModelForCausalLM.from_pretrained(f"{work}/again", trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
try:
    options = {"ladder_residual": {"layes": "1"}, "trust_remote_code": True}
    AutoConfig.from_pretrained(folder, **options).ladder_layers
except ValueError as error:
    message = str(error)
save_file(
    {
        "logits": model(ids).logits.detach(),
        "again": again(ids).logits.detach(),
        "base": base(ids).last_hidden_state.detach(),
        "generated": generated,
    },
    f"{work}/out.safetensors",
)
print(json.dumps({
    "modules": sorted({type(m).__module__.split(".")[0] for m in (model, again, base)}),
    "ours": sorted(m for m in sys.modules if m.startswith(("torch_plugins", "megatron_plugins"))),
    "error": message,
}))
"""


@pytest.fixture
def load_without_our_packages(tmp_path):
    def load(folder: Path, ids: torch.Tensor) -> tuple[dict, dict]:
        work = tmp_path / "work"
        work.mkdir()
        save_file({"ids": ids}, work / "ids.safetensors")
        env = os.environ | {
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch would import our entry point
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # else sums round otherwise
        }
        run = subprocess.run(
            [sys.executable, "-I", "-c", LOAD_WITHOUT_OUR_PACKAGES, str(folder), str(work)],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout.splitlines()[-1]), load_file(work / "out.safetensors")

    return load


def test_loads_without_our_packages(make_model, tokens, tmp_path, load_without_our_packages):
    cla = {"sharing_factor": 3, "kv_norm": "separate"}
    moe = {"num_experts": 5, "gated": True, "attention_experts": 2, "threshold": 0.8}
    moe |= {"inference": "threshold", "attention_inference": "threshold"}
    model = make_model(
        ladder_residual={"layers": "1-2"},
        cross_layer_attention=cla,
        dense_moe=moe,
        qk_norm=True,
        attention_bias=True,
        attention_output_bias=False,
    )
    folder = tmp_path / "model-1.0"
    model.save_pretrained(folder)
    facts, out = load_without_our_packages(folder, tokens())

    assert facts["ours"] == []
    assert facts["modules"] == ["transformers_modules"]
    assert "did you mean 'layers'" in facts["error"]
    expected = model(tokens()).logits
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(out["logits"], expected, **close)
    torch.testing.assert_close(out["again"], expected, **close)
    torch.testing.assert_close(out["base"], model.model(tokens()).last_hidden_state, **close)
    generated = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert torch.equal(out["generated"], generated)
    assert {p.name for p in (tmp_path / "work" / "again").glob("*.py")} == CODE


@pytest.mark.parametrize("trust", [False, True])
def test_loads_with_our_package(make_model, tokens, tmp_path, trust):
    model = make_model(ladder_residual={"layers": "all"}, tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(again) is type(model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert isinstance(AutoModel.from_pretrained(tmp_path), PluginDecoderModel)


def test_rotary_buffers_survive_loading(make_model, tmp_path):
    """transformers builds models on the meta device: a plain buffer would come back as garbage."""
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    model = make_model(head_dim=12, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = 500.0 ** -(torch.arange(0, 6, 2) / 6)
    for name in ("inv_freq", "original_inv_freq"):
        torch.testing.assert_close(getattr(again.model.rotary_emb, name), expected)


def test_written_files_import_nothing_of_ours(tmp_path):
    files = write_remote_code(tmp_path)
    assert {f.name for f in files} == CODE
    for file in files:
        text = file.read_text()
        assert "import torch_plugins" not in text
        assert "from torch_plugins" not in text
        assert "from .." not in text.replace("from ..x", "")
