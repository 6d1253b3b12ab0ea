"""Standard checkpoints initialised into Cross-Layer Attention, and what Megatron does with them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_plugins import convert
from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
from megatron_plugins.export.reference_tensors import ReferenceTensors
from tests.megatron.harness import train
from tests.parity.conftest import CASES, Case
from torch_plugins import reference
from torch_plugins.config import CrossLayerAttention

STOCK = {
    "gelu-partial-rope-tp2": (4, 4, 16),  # LayerNorm and biases; layers stacked
    "interleaved-rope-wide-heads-tp2": (4, 2, 24),
    "numbered-layers-tp2": (4, 4, 16),
}
"""Case -> query heads, key-value heads, head size."""
LAYERS = 4
QKV, KV = "self_attention.linear_qkv", "self_attention.linear_kv"


def converted(load: Path, save: Path, *flags: str) -> Checkpoint:
    assert convert.main(["--load", str(load), "--save", str(save), *flags]) == 0
    return Checkpoint(find_iteration(save))


def layer_tensor(checkpoint: Checkpoint, layer: int, name: str) -> Tensor:
    if f"decoder.layers.{name}" in checkpoint.tensors:
        return checkpoint.read(f"decoder.layers.{name}", layer)
    return checkpoint.read(f"decoder.layers.{layer}.{name}")


def kinds(checkpoint: Checkpoint) -> list[str]:
    return (
        ["weight", "bias"]
        if any(key.endswith("bias") for key in checkpoint.tensors)
        else ["weight"]
    )


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("kv", ["first", "mean"])
@pytest.mark.parametrize("norm", ["shared", "separate"])
def test_keys_and_values(checkpoints: Path, tmp_path: Path, name: str, norm: str, kv: str) -> None:
    """Layers 0, 0, 0, 3: a group of three and one alone."""
    queries, groups, size = STOCK[name]
    flags = ("--cla-pattern", "0,0,0,3", "--cla-kv-norm", norm, "--kv", kv)
    new = converted(checkpoints / name, tmp_path / "new", *flags)
    old = Checkpoint(find_iteration(checkpoints / name))

    def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
        heads = tensor.view(groups, queries // groups + 2, size, *tensor.shape[1:])
        return tuple(x.reshape(-1, *tensor.shape[1:]) for x in (heads[:, :-2], heads[:, -2:]))

    for kind in kinds(old):
        before = [parts(layer_tensor(old, layer, f"{QKV}.{kind}")) for layer in range(LAYERS)]
        keys = {0: before[0][1], 3: before[3][1]}
        if kv == "mean":
            keys[0] = torch.stack([layer[1] for layer in before[:3]]).mean(0)
        for layer in range(LAYERS):
            after = layer_tensor(new, layer, f"{QKV}.{kind}")
            if norm == "shared" and layer in keys:
                after, own = parts(after)
                assert torch.equal(own, keys[layer])
            assert torch.equal(after, before[layer][0])
            key = f"decoder.layers.{layer}.{KV}.{kind}"
            assert (key in new.tensors) == (norm == "separate" and layer in keys)
            if key in new.tensors:
                assert torch.equal(new.read(key), keys[layer])
                norms = (f"{linear}.layer_norm_{kind}" for linear in (QKV, KV))
                if (
                    kind == "weight"
                    or f"decoder.layers.{layer}.{QKV}.layer_norm_bias" in new.tensors
                ):
                    assert torch.equal(*(layer_tensor(new, layer, one) for one in norms))


@pytest.mark.parametrize("name", STOCK)
def test_everything_else_is_kept(checkpoints: Path, tmp_path: Path, name: str) -> None:
    new = converted(checkpoints / name, tmp_path / "new", "--cla-sharing-factor", "2")
    old = Checkpoint(find_iteration(checkpoints / name))
    outside = [key for key in old.tensors if not key.startswith("decoder.layers.")]
    assert len(outside) >= 2
    for key in outside:
        assert torch.equal(new.read(key), old.read(key))
    inside = [
        "mlp.linear_fc1.weight",
        "self_attention.linear_proj.weight",
        f"{QKV}.layer_norm_weight",
    ]
    for part in inside:
        for layer in range(LAYERS):
            before, after = (layer_tensor(checkpoint, layer, part) for checkpoint in (old, new))
            assert torch.equal(before, after)
    assert [key for key in new.states if "_extra_state" not in key] == []
    assert f"decoder.layers.3.{QKV}._extra_state/shard_0_1" in new.states
    args = vars(new.args)
    assert (args["cla_sharing_factor"], args["consumed_train_samples"]) == (2, 0)
    assert args["hidden_size"] == 64


@pytest.mark.parametrize("norm", ["shared", "separate"])
def test_the_function_is_the_standard_models_with_its_first_keys(
    checkpoints: Path, tmp_path: Path, norm: str
) -> None:
    """By the naive reference: a copy of the norm is no other function."""
    stock = Case.open(checkpoints / "gelu-partial-rope-tp2")
    feature = CrossLayerAttention(2, kv_norm=norm)
    flags = ("--cla-sharing-factor", "2", "--cla-kv-norm", norm)
    converted(checkpoints / "gelu-partial-rope-tp2", tmp_path / "new", *flags, "--kv", "first")
    new = Case.open(tmp_path / "new")
    expected = reference.logits(
        ReferenceTensors(stock.checkpoint, stock.config, None),
        stock.config.to_dict() | {feature.key(): {"sharing_factor": 2}},
        stock.input_ids,
    )
    found = reference.logits(
        ReferenceTensors(new.checkpoint, new.config, None), new.config.to_dict(), stock.input_ids
    )
    assert new.config.cross_layer_attention == feature.to_dict()
    assert torch.equal(found, expected) if norm == "shared" else found.allclose(expected, atol=1e-5)


MODEL = shlex.split(CASES["gelu-partial-rope-tp2"])  # on two tensor-parallel ranks
SEPARATE = ("--cla-sharing-factor", "2", "--cla-kv-norm", "separate")


def test_megatron_trains_on_from_it(checkpoints: Path, tmp_path: Path) -> None:
    """Without --finetune or --no-load-optim, from iteration 0."""
    stock = checkpoints / "gelu-partial-rope-tp2"
    converted(stock, tmp_path / "new", *SEPARATE)
    run = train(*MODEL, *SEPARATE, "--load", tmp_path / "new", processes=2)
    assert list(run.losses) == list(range(1, 7))
    assert run.losses[6] < run.losses[1]
    assert "loading release distributed checkpoint" in run.output


def test_a_standard_checkpoint_is_refused_with_the_command(checkpoints: Path) -> None:
    stock = checkpoints / "gelu-partial-rope-tp2"
    flags = (*MODEL, "--tensor-model-parallel-size", 1, "--cla-sharing-factor", 2, "--finetune")
    run = train(*flags, "--load", stock, check=False)
    assert run.returncode != 0
    command = f"Convert it: python -m megatron_plugins.convert --load {stock} --save NEW"
    assert f"{command} --cross-layer-attention --cla-sharing-factor 2" in run.output


def test_what_cannot_be_converted(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = checkpoints / "llama-gqa-tp2"

    def refused(load: Path, *flags: str, save: Path = tmp_path / "new") -> str:
        assert convert.main(["--load", str(load), "--save", str(save), *flags]) == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "nothing to convert to: give --cross-layer-attention" in refused(stock)
    assert "(--cla-sharing-factor) 5: the model has 4" in refused(
        stock, "--cla-sharing-factor", "5"
    )
    message = refused(stock, "--cross-layer-attention", save=stock)
    assert f"--save {stock} is there already" in message
    again = refused(checkpoints / "cla-learned-tp2", "--cla-sharing-factor", "4")
    assert "its layers share keys and values already" in again


def test_nothing_stays_of_a_failure(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read

    def fails(self: Checkpoint, key: str, row: int | None = None) -> Tensor:
        if "final_layernorm" in key:
            raise OSError("no such block")
        return read(self, key, row)

    monkeypatch.setattr(Checkpoint, "read", fails)
    with pytest.raises(BaseException, match="no such block"):
        converted(checkpoints / "llama-gqa-tp2", tmp_path / "new", "--cross-layer-attention")
    assert list((tmp_path / "new").iterdir()) == []
