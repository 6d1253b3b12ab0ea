"""A standard checkpoint initialised into Cross-Layer Attention, and loaded by Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_plugins import convert
from megatron_plugins.export.checkpoint import Checkpoint, find_iteration
from tests.megatron.harness import train

MODEL = (
    *("--swiglu", "--position-embedding-type", "rope", "--init-method-std", 0.2),
    *("--group-query-attention", "--num-query-groups", 2),
)
LAYERS, HEADS, GROUPS, SIZE = 4, 4, 2, 16
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LayerNorm and biases, so that everything has two parts."""
    folder = tmp_path_factory.mktemp("stock")
    train(*MODEL, "--save", folder, "--exit-interval", 2)
    return folder


def converted(stock: Path, save: Path, *flags: str) -> Checkpoint:
    assert convert.main(["--load", str(stock), "--save", str(save), *flags]) == 0
    return Checkpoint(find_iteration(save))


def rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[H * P, ...]`` and keys with values ``[K * 2 * P, ...]`` of a ``linear_qkv``."""
    rest = tensor.shape[1:]
    heads = tensor.view(GROUPS, HEADS // GROUPS + 2, SIZE, *rest)
    return heads[:, :-2].reshape(-1, *rest), heads[:, -2:].reshape(-1, *rest)


QKV = "self_attention.linear_qkv"
KV = "self_attention.linear_kv"


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("kv", ["first", "mean"])
@pytest.mark.parametrize("norm", ["shared", "separate"])
def test_tensors(stock: Path, tmp_path: Path, norm: str, kv: str, kind: str) -> None:
    """Layers 0, 0, 0, 3: a group of three and one alone."""
    flags = ("--cla-pattern", "0,0,0,3", "--cla-kv-norm", norm, "--kv", kv)
    new = converted(stock, tmp_path / "new", *flags)
    old = Checkpoint(find_iteration(stock))
    before = [rows(old.read(f"decoder.layers.{QKV}.{kind}", layer)) for layer in range(LAYERS)]
    keys = before[0][1]
    if kv == "mean":
        keys = torch.stack([layer[1] for layer in before[:3]]).mean(0)
    for layer in range(LAYERS):
        after = new.read(f"decoder.layers.{layer}.{QKV}.{kind}")
        produces = layer in (0, 3)
        if norm == "separate" or not produces:
            assert torch.equal(after, before[layer][0])
        else:
            queries, own = rows(after)
            assert torch.equal(queries, before[layer][0])
            assert torch.equal(own, keys if layer == 0 else before[3][1])
        own_key = f"decoder.layers.{layer}.{KV}.{kind}"
        assert (own_key in new.tensors) == (norm == "separate" and produces)
        if own_key in new.tensors:
            assert torch.equal(new.read(own_key), keys if layer == 0 else before[3][1])
            copy = new.read(f"decoder.layers.{layer}.{KV}.layer_norm_{kind}")
            assert torch.equal(copy, new.read(f"decoder.layers.{layer}.{QKV}.layer_norm_{kind}"))


def test_everything_else_is_kept(stock: Path, tmp_path: Path) -> None:
    new = converted(stock, tmp_path / "new", "--cla-sharing-factor", "2")
    old = Checkpoint(find_iteration(stock))
    untouched = [name for name in old.tensors if not name.startswith("optimizer.")]
    untouched = [name for name in untouched if f"{QKV}.weight" not in name]
    compared = 0
    for name in untouched:
        if name.startswith("decoder.layers.") and f"{QKV}.bias" not in name:
            for layer in range(LAYERS):
                numbered = name.replace("layers.", f"layers.{layer}.")
                assert torch.equal(new.read(numbered), old.read(name, layer))
                compared += 1
        elif not name.startswith("decoder.layers."):
            assert torch.equal(new.read(name), old.read(name))
            compared += 1
    assert compared >= 36
    assert not [name for name in new.tensors if "optimizer" in name]
    assert not [name for name in new.states if "_extra_state" not in name]
    extra = "self_attention.linear_qkv._extra_state/shard_0_1"
    assert f"decoder.layers.3.{extra}" in new.states
    args = vars(new.args)
    assert args["cla_sharing_factor"] == 2
    assert args["consumed_train_samples"] == 0
    assert args["hidden_size"] == 64


def test_megatron_trains_on_from_it(stock: Path, tmp_path: Path) -> None:
    """Without --finetune or --no-load-optim; on any layout; a second norm is no other function."""
    shared, separate = tmp_path / "shared", tmp_path / "separate"
    converted(stock, shared, "--cla-sharing-factor", "2")
    converted(stock, separate, "--cla-sharing-factor", "2", "--cla-kv-norm", "separate")
    cla = (*MODEL, "--cla-sharing-factor", 2)
    one = train(*cla, *PP2, "--load", shared, processes=2)
    two = train(*cla, *TP2, "--cla-kv-norm", "separate", "--load", separate, processes=2)
    assert sorted(one.losses) == sorted(two.losses) == list(range(1, 7))
    assert one.losses[1] == pytest.approx(two.losses[1], rel=2e-5)
    assert one.losses[6] != pytest.approx(two.losses[6], rel=2e-5)


def test_a_standard_checkpoint_is_refused_with_the_command(stock: Path) -> None:
    run = train(*MODEL, "--cla-sharing-factor", 2, "--load", stock, "--finetune", check=False)
    assert run.returncode != 0
    assert (
        f"Convert it: python -m megatron_plugins.convert --load {stock} --save NEW "
        "--cross-layer-attention --cla-sharing-factor 2"
    ) in run.output


def test_what_cannot_be_converted(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(load: Path, *flags: str, save: Path = tmp_path / "new") -> str:
        assert convert.main(["--load", str(load), "--save", str(save), *flags]) == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "nothing to convert to: give --cross-layer-attention" in refused(stock)
    assert "--cla-sharing-factor) 5: the model has 4" in refused(stock, "--cla-sharing-factor", "5")
    message = refused(stock, "--cross-layer-attention", save=stock)
    assert f"--save {stock} is there already" in message
    converted(stock, tmp_path / "shared", "--cross-layer-attention")
    again = refused(tmp_path / "shared", "--cla-sharing-factor", "4")
    assert "its layers share keys and values already" in again


def test_nothing_stays_of_a_failure(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read

    def fails(self: Checkpoint, key: str, row: int | None = None) -> Tensor:
        if "final_layernorm" in key:
            raise OSError("no such block")
        return read(self, key, row)

    monkeypatch.setattr(Checkpoint, "read", fails)
    with pytest.raises(BaseException, match="no such block"):
        converted(stock, tmp_path / "new", "--cross-layer-attention")
    assert list((tmp_path / "new").iterdir()) == []
