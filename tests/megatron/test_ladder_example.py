"""The ladder example: its data, its reading of the log, its cluster scripts, and the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ladder_residual"
CLUSTER = {"pretrain_8b.sh": 8, "pretrain_70b.sh": 64}
PATHS = {
    "MEGATRON_LM": "/opt/Megatron-LM",
    "DATA_PATH": "/data/corpus",
    "TOKENIZER": "/data/tokenizer",
    "CHECKPOINTS": "/checkpoints",
}


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def script(name, *arguments, **environment):
    return subprocess.run(
        ["bash", str(EXAMPLE / name), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )


def arguments_of(name, ladder, *more):
    result = script(name, *more, **PATHS, LADDER=str(int(ladder)), DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", CLUSTER)
def test_cluster_script_differs_by_one_flag(name):
    standard, ladder = (arguments_of(name, on) for on in (False, True))
    assert [word for word in ladder if word != "--ladder-residual"] == standard
    assert ladder.count("--ladder-residual") == 1
    assert arguments_of(name, True, "--train-iters", "7")[-2:] == ["--train-iters", "7"]


@pytest.mark.parametrize("name", CLUSTER)
@pytest.mark.parametrize("missing", PATHS)
def test_cluster_script_names_what_is_unset(name, missing):
    given = {key: value for key, value in PATHS.items() if key != missing}
    result = script(name, **given, DRY_RUN="1")
    assert result.returncode != 0
    assert f"{missing}: " in result.stderr


def test_70b_script_needs_its_place_among_the_nodes():
    result = script("pretrain_70b.sh", **PATHS)
    assert result.returncode != 0
    assert "MASTER_ADDR: " in result.stderr
    result = script("pretrain_70b.sh", **PATHS, MASTER_ADDR="node0")
    assert result.returncode != 0
    assert "set NODE_RANK" in result.stderr


@pytest.mark.parametrize("ladder", [False, True], ids=["standard", "ladder"])
@pytest.mark.parametrize("name", CLUSTER)
def test_megatron_accepts_the_cluster_scripts(name, ladder, monkeypatch):
    """Through the real parser, validation and configuration, as rank 0 of the cluster.

    Two things of a GPU machine are missing here: the device's generation, and TransformerEngine,
    without which the configuration refuses the fused RoPE.
    """
    import torch
    from megatron.training import arguments

    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: hopper)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *arguments_of(name, ladder)])
    monkeypatch.setenv("WORLD_SIZE", str(CLUSTER[name]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = arguments.parse_args()
    arguments.validate_args(args)
    assert (args.data_parallel_size, args.tensor_model_parallel_size) == (1, 8)
    args.apply_rope_fusion = False
    config = arguments.core_transformer_config_from_args(args)
    active = getattr(config, "megatron_plugins", {})
    assert list(active) == (["ladder_residual"] if ladder else [])


def read_documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prefix.parent / "tokenizer")
    data = IndexedDataset(str(prefix))
    return tokenizer, [list(data[i]) for i in range(len(data))]


def test_data(tmp_path):
    from prepare_data import END_OF_TEXT, prepare
    from prepare_data import read_documents as sources

    corpora = [prepare(tmp_path / name, vocab_size=300, limit=60) for name in ("a", "b")]
    assert corpora[0] == corpora[1]
    written = {path.name: path for path in (tmp_path / "a").iterdir() if path.is_file()}
    for name, path in written.items():
        assert path.read_bytes() == (tmp_path / "b" / name).read_bytes(), name

    documents = sources(limit=60)
    for split, held_out in (("train", False), ("valid", True)):
        tokenizer, ids = read_documents(tmp_path / "a" / split)
        texts = [document.text for document in documents if document.held_out == held_out]
        assert texts
        assert [tokenizer.decode(i) for i in ids] == [text + END_OF_TEXT for text in texts]
        assert all(i[-1] == tokenizer.eos_token_id for i in ids)
        assert sum(map(len, ids)) == getattr(corpora[0], f"{split}_tokens")
    assert len(tokenizer) == 300

    before = written["train.bin"].stat().st_mtime_ns
    assert prepare(tmp_path / "a", vocab_size=300, limit=60) == corpora[0]
    assert written["train.bin"].stat().st_mtime_ns == before
    (tmp_path / "b" / "data.json").write_text('{"fingerprint": "of another version"}')
    assert prepare(tmp_path / "b", vocab_size=300, limit=60) == corpora[0]


def test_smoothing_and_means():
    from training_log import History

    history = History(100, iterations=[1, 2, 3], losses=[4.0, 2.0, 3.0], step_ms=[9.0, 50.0, 10.0])
    assert history.smoothed(0.5) == pytest.approx([4.0, 8 / 3, 20 / 7])
    assert history.final_loss == 3.0
    assert history.tokens_per_second == pytest.approx(10_000)
    assert not history.read("> building train, validation, and test datasets for GPT ...")


def test_demo_leaves_other_folders_alone(tmp_path):
    from training import DemoError, own_folder

    theirs = tmp_path / "standard"
    theirs.mkdir()
    (theirs / "thesis.tex").touch()
    with pytest.raises(DemoError, match="is not this demo's"):
        own_folder(theirs)
    assert (theirs / "thesis.tex").exists()

    (own_folder(tmp_path / "ladder") / "old").touch()
    assert not (own_folder(tmp_path / "ladder") / "old").exists()


def test_resume_keeps_an_arm_only_with_the_same_settings_and_data(tmp_path):
    from dataclasses import replace

    from demo import finished, identity
    from prepare_data import Corpus
    from settings import QUICK
    from training_log import History

    corpus = Corpus(512, 10, 1000, 100, "fingerprint")
    history = History(512, [1], [6.0], [10.0], [1], [6.0])
    assert finished("ladder", QUICK, corpus, tmp_path) is None
    (tmp_path / "ladder").mkdir()
    history.save(tmp_path / "ladder" / "history.json")
    (tmp_path / "ladder" / "finished.json").write_text(json.dumps(identity(QUICK, corpus)))
    assert finished("ladder", QUICK, corpus, tmp_path) == history
    assert finished("ladder", replace(QUICK, seed=2), corpus, tmp_path) is None
    assert finished("ladder", QUICK, replace(corpus, fingerprint="other"), tmp_path) is None


def test_failed_step_names_its_log(tmp_path):
    from training import DemoError, run_logged

    program = "print('about to fail'); raise SystemExit(3)"
    with (
        pytest.raises(DemoError, match=r"exit code 3:\nabout to fail\n\nall of it: .*/log.txt"),
        run_logged([sys.executable, "-c", program], tmp_path / "log.txt"),
    ):
        pass


def test_demo_end_to_end(tmp_path):
    """``demo.py --quick``: every step of ``make demo`` with a toy model."""
    output = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, str(EXAMPLE / "demo.py"), "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ladder-residual: 2 of 2 layers" in result.stdout
    assert "logits equal" in result.stdout
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    from training_log import History

    runs = {arm: History.load(output / arm / "history.json") for arm in ("standard", "ladder")}
    for run in runs.values():
        assert run.iterations == [1, *range(2, 21, 2)]  # upstream logs the first one, too
        assert run.losses[-1] < run.losses[0] - 0.3
        assert run.valid_iterations[-1] == 20
        assert abs(run.valid_losses[-1] - run.losses[-1]) < 0.5
    # The same data from the same weights, and another function.
    assert runs["standard"].losses[0] == pytest.approx(runs["ladder"].losses[0], abs=0.05)
    assert runs["standard"].losses != runs["ladder"].losses

    config = json.loads((output / "export" / "hf" / "config.json").read_text())
    assert config["ladder_residual"] == {"layers": "all"}
