"""muP of Power LR without a framework: groups and initial values of a small model of our own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torch_plugins.config import ConfigError
from torch_plugins.mup import initialize, param_groups

WIDTH, VOCABULARY, LAYERS, M = 96, 320, 3, 6.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH)
        self.experts = nn.Parameter(torch.zeros(4, WIDTH, WIDTH))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight


def by_name(model: nn.Module, groups: list) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter that is in a group, each once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_groups() -> None:
    """Table 1, for AdamW: the optimizer takes the groups as they are."""
    model = Model()
    optimizer = torch.optim.AdamW(param_groups(model, 0.012, M, weight_decay=0.1))
    found = by_name(model, optimizer.param_groups)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "hidden": pytest.approx(0.002),
        "vocabulary": 0.012,
        "vector": 0.012,
    }
    for name, (rate, decay) in found.items():
        vector = "norm" in name or name.endswith("bias")
        outside = name.startswith(("tokens", "positions", "lm_head"))
        assert rate == pytest.approx(0.012 if vector or outside else 0.002), name
        assert decay == (0 if vector else 0.1), name


def test_a_tied_head_is_in_one_group_and_frozen_parameters_in_none() -> None:
    model = Model(tied=True)
    model.blocks[0].experts.requires_grad_(False)
    found = by_name(model, param_groups(model, 1.0, M))
    assert found["tokens.weight"] == (1.0, 0.1)
    assert found.keys() == dict(model.named_parameters()).keys() - {"blocks.0.experts"}


def test_groups_keep_their_proportions_under_power_lr() -> None:
    from torch_plugins.power_lr import PowerLR

    optimizer = torch.optim.AdamW(param_groups(Model(), 0.02, M))
    scheduler = PowerLR(optimizer, batch_size=64, sequence_length=4096, warmup_tokens=2**20)
    rates = []
    for _ in range(40):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    hidden, vocabulary, vector = map(torch.tensor, zip(*rates, strict=True))
    assert len(set(vector.tolist())) > 3
    assert torch.equal(vocabulary, vector)
    torch.testing.assert_close(hidden * M, vector)


@pytest.mark.parametrize("num_layers", [None, LAYERS])
def test_initial_values(num_layers: int | None) -> None:
    model = Model()
    nn.init.ones_(model.blocks[0].up_proj.bias)
    initialize(model, 0.1, M, num_layers, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.1 if name.startswith(("tokens", "positions", "lm_head")) else 0.1 / M**0.5
            if num_layers and "down_proj" in name:
                std /= math.sqrt(2 * LAYERS)
            error = 4 / math.sqrt(2 * parameter.numel())  # four sigma of a measured std
            assert parameter.std().item() == pytest.approx(std, rel=error), name
            assert abs(parameter.mean().item()) <= 4 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("call", [lambda *a, **k: param_groups(a[0], 1.0, *a[2:], **k), initialize])
def test_what_cannot_be_right_is_an_error(call) -> None:
    with pytest.raises(ConfigError, match=r"head 'output': no module"):
        call(Model(), 0.1, M, head="output")
    with pytest.raises(ConfigError, match=r"width_multiplier 0: must be positive"):
        call(Model(), 0.1, 0)
    call(Model().blocks, 0.1, M, head=None)


def test_depth_needs_its_output_projections() -> None:
    with pytest.raises(ConfigError, match=r"output_projections \['o_proj'\]: no parameter"):
        initialize(Model(), 0.1, M, LAYERS, output_projections=["o_proj"])
