"""lm-eval on exported folders through its ordinary command, offline, with a task of its own.

``make lm-eval-check`` builds the environment, apart from ours: it asks for many packages.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hf.w4a4_models import ASYMMETRIC, VOCAB, ids, plugin, save
from torch_plugins.w4a4.folder import Folder
from torch_plugins.w4a4.quantize import Recipe
from torch_plugins.w4a4.quantize_folder import Job, quantize_folder

COMMAND = Path(__file__).parents[2] / ".matrix/lm-eval/bin/python"
TASK = """task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A ladder with shared keys in four bits, that carries its code, and a task that it solves in
    part: of two letters, the likelier one is the answer in 30 of 40 questions."""
    if not COMMAND.exists() or "LM_EVAL_CHECK" not in os.environ:
        pytest.skip("takes minutes, in an environment of its own: run make lm-eval-check")
    work = tmp_path_factory.mktemp("lm-eval")
    source = save(plugin, ASYMMETRIC, work / "source")
    tokenizer(source)
    quantize_folder(
        Job(Folder(source), work / "model", Recipe("rtn", "learned")), lambda line: None
    )
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    questions = []
    tokens = AutoTokenizer.from_pretrained(work / "model")
    for number, row in enumerate(ids(40, 8, seed=5)):
        with torch.no_grad():
            likeliest, *_, least = model(input_ids=row[None]).logits[0, -1].argsort().tolist()[::-1]
        choices = [letters([likeliest]), letters([least])]
        assert tokens(letters(row))["input_ids"] == row.tolist()
        questions.append({"text": letters(row), "choices": choices, "answer": int(number >= 30)})
    data = work / "letters.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (work / "tasks").mkdir()
    (work / "tasks/letters.yaml").write_text(TASK.format(data=data))
    return work


def letters(row):
    return "".join(chr(48 + int(token)) for token in row)


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({chr(48 + i): i for i in range(VOCAB)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="0", eos_token="1", pad_token="1"
    ).save_pretrained(folder)


@pytest.mark.parametrize("remote_code", [False, True], ids=["our package", "the folder's code"])
def test_the_command_scores_a_quantized_folder(work, remote_code):
    model = f"pretrained={work / 'model'},dtype=float32"
    alone = {"HF_MODULES_CACHE": str(work / "modules"), "HF_DATASETS_CACHE": str(work / "data")}
    if remote_code:
        alone["TORCH_PLUGINS_DISABLE"] = "1"
        model += ",trust_remote_code=True"
    output = work / f"scores-{remote_code}"
    arguments = ["--model", "hf", "--model_args", model, "--tasks", "letters"]
    arguments += ["--include_path", work / "tasks", "--output_path", output, "--device", "cpu"]
    done = subprocess.run(
        [COMMAND, "-m", "lm_eval", *map(str, arguments), "--batch_size", "8"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | alone,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = output.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["letters"]["acc,none"] == 0.75
