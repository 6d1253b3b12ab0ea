"""``python -m torch_plugins.dense_moe``: the paper's parameter counts, and routers over a text."""

import json
import math

import pytest
import torch

from torch_plugins.dense_moe_cli import main

SIZES = {
    "--hidden-size": 8,
    "--num-layers": 3,
    "--attention-experts": 2,
    "--heads": 2,
    "--head-dim": 4,
    "--num-experts": 4,
    "--ffn-hidden-size": 5,
}


def flags(sizes):
    return [str(part) for pair in sizes.items() for part in pair]


def refused(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_the_papers_counts(capsys):
    main(["table", "--json"])
    rows = {(row["model"], row["kind"]): row for row in json.loads(capsys.readouterr().out)}
    millions = {key: row["parameters"] / 1e6 for key, row in rows.items()}
    expected = {
        "1b": (1070.1, 1021.6, 1019.2),
        "3b": (2797.1, 2711.9, 2708.5),
        "6b": (6342.5, 6196.7, 6190.8),
    }
    for name, counts in expected.items():
        for kind, count in zip(("mlp-512", "linear", "twin"), counts, strict=True):
            assert millions[name, kind] == pytest.approx(count, abs=0.05)
        # The routers that the paper's own counts imply: its models over their twins.
        printed = (
            rows[name, "mlp-512"]["paper_millions"][-1] - rows[name, "twin"]["paper_millions"][0]
        )
        assert rows[name, "mlp-512"]["routers"] / 1e6 == pytest.approx(printed, rel=0.04)
    assert rows["3b", "mlp-512"]["paper_millions"] == [2846, 2793]


def test_table_for_readers(capsys):
    main(["table", "--preset", "3b", "--top-k", "6"])
    text = capsys.readouterr().out
    for part in ("2797.1", "2846 /", "2793", "-48.9 /", "+4.1", "2711.9", "2705"):
        assert part in text
    assert "2846M in table 1, 2793M in table 5" in text
    assert "6 MLP experts of a token" in text


def test_sizes_of_ones_own(capsys):
    main(["table", *flags(SIZES), "--gated", "--top-k", "1", "--json"])
    mlp, linear, twin = json.loads(capsys.readouterr().out)
    experts, attention = 3 * 8 * 20, 2 * 8 * 16 + 2 * 8 * 8
    assert twin["parameters"] == twin["active"] == 3 * (experts + attention)
    assert linear["routers"] == 3 * (4 + 2) * 8
    assert mlp["routers"] == 3 * (2 * 512 * 8 + (4 + 2) * 512)
    assert linear["parameters"] == twin["parameters"] + linear["routers"]
    assert linear["active"] == linear["parameters"] - 3 * experts * 3 // 4
    main(["table", "--preset", "1b", "--num-layers", "12", "--json"])
    half = json.loads(capsys.readouterr().out)[0]
    assert half["parameters"] / 1e6 == pytest.approx(1070.1 / 2, abs=0.05)
    assert half["paper_millions"] == []
    main(["table", *flags(SIZES | {"--attention-experts": 0}), "--json"])
    ordinary = json.loads(capsys.readouterr().out)[1]
    assert ordinary["routers"] == 3 * 4 * 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k", "33"], "--top-k 33: 1b has 32 MLP experts"),
        (["--preset", "1b", "3b", "--heads", "2"], "--preset 1b 3b: sizes beside it change one"),
        (["--heads", "2"], "--hidden-size, --num-layers, --attention-experts, --head-dim"),
        (["--preset", "7b"], "invalid choice: '7b'"),
        (["--hidden-size", "0"], "use an integer of at least 1"),
        (["--num-experts", "-1"], "use an integer of at least 0"),
        ([*flags(SIZES | {"--num-experts": 1})], "num_experts"),
    ],
)
def test_wrong_sizes(argv, message, capsys):
    assert message in refused(["table", *argv], capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two layers of four experts; layer 0 sends a, b, c and d to one expert each, layer 1 does not
    choose. Attention experts too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from torch_plugins.hf import PluginDecoderConfig, PluginDecoderForCausalLM

    path = tmp_path_factory.mktemp("experts")
    config = PluginDecoderConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        dense_moe={
            "num_experts": 4,
            "attention_experts": 2,
            "gated": True,
            "router": "linear",
            "inference": "top-k",
            "top_k": 1,
        },
    )
    model = PluginDecoderForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(4))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.router.weight.zero_()
            layer.mlp.router.weight.zero_()
        model.model.layers[0].mlp.router.weight.copy_(50 * torch.eye(4))
        # N S of 1.1 and 0.9: the norm makes 2 of the embedding's 1.
        model.model.layers[0].self_attn.router.weight[0].fill_(0.1)
    model.save_pretrained(path)
    core = Tokenizer(models.WordLevel(dict(zip("abcd", range(4), strict=True)), unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="a").save_pretrained(path)
    (path / "text.txt").write_text("abcdabcaaa")
    return path


def test_utilization(folder, tmp_path, capsys):
    picture = tmp_path / "heat.png"
    options = ["--text", str(folder / "text.txt"), "--sequence-length", "3", "--tokens", "8"]
    main(["utilization", str(folder), *options, "--output", str(picture), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {(row["layer"], row["kind"]): row for row in told["routers"]}
    assert set(rows) == {(layer, kind) for layer in (0, 1) for kind in ("mlp", "attention")}
    sure, unsure = rows[0, "mlp"], rows[1, "mlp"]
    shares = [3 / 8, 2 / 8, 2 / 8, 1 / 8]  # of abcdabca
    assert sure["share_N"] == pytest.approx(shares, abs=1e-4)
    assert sure["active_N"] == pytest.approx(shares, abs=1e-4)
    entropy = -sum(p * math.log(p) for p in shares)
    assert sure["mutual_information"] == pytest.approx(entropy, abs=1e-4)
    assert sure["conditional_entropy"] == pytest.approx(0, abs=1e-4)
    assert sure["active"] == pytest.approx(1 / 4, abs=1e-4)
    assert unsure["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert unsure["conditional_entropy"] == pytest.approx(math.log(4), abs=1e-4)
    assert unsure["active"] == 1
    assert rows[0, "attention"]["active_N"] == [1, 1]
    main(["utilization", str(folder), *options, "--threshold", "0.95", "--json"])
    strict = json.loads(capsys.readouterr().out)["routers"]
    (active,) = (
        row["active_N"] for row in strict if (row["layer"], row["kind"]) == (0, "attention")
    )
    assert active == [1, 0]

    main(["utilization", str(folder), *options])
    text = capsys.readouterr().out
    assert "Routers over 8 tokens" in text
    assert "1.3863" in text
    assert "written" not in text


def test_utilization_refuses(folder, tmp_path, capsys):
    from torch_plugins.hf import PluginDecoderConfig

    def told(path, *options, text=folder / "text.txt"):
        return refused(["utilization", str(path), "--text", str(text), *options], capsys)

    assert "no config.json there" in told(tmp_path / "missing")
    assert "use a number of at least 0 and below 1" in told(folder, "--threshold", "1")
    assert "missing.txt" in told(folder, text=tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "finds no token" in told(folder, text=tmp_path / "empty.txt")
    wrong = str(tmp_path / "missing" / "heat.png")
    assert f"--output {wrong}" in told(folder, "--output", wrong)
    dense = PluginDecoderConfig(hidden_size=8, num_attention_heads=2)
    dense.save_pretrained(tmp_path / "dense")
    assert "without dense_moe" in told(tmp_path / "dense")
    bare = tmp_path / "bare"
    PluginDecoderConfig.from_pretrained(folder).save_pretrained(bare)
    assert "has no tokenizer, and random ids would say nothing" in told(bare)
