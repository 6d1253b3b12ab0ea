"""Run vLLM on one folder and write down what it computed, or why it refused.

python -m tests.serve.engine JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def describe(model: Any) -> list[str]:
    """Where the served class and the decoder inside it are from."""
    return [f"{type(m).__module__}.{type(m).__qualname__}" for m in (model, model.model)]


def build(job: dict[str, Any], options: dict[str, Any]) -> Any:
    from vllm import LLM

    standing = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_batched_tokens": 128,  # splits the prompts into chunks
        "block_size": 32,  # the longer prompts share blocks when they come again
        "max_logprobs": -1,
        "enforce_eager": True,
    }
    return LLM(job["folder"], **standing | job["options"] | options)


def compute(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    llm = build(job, {})
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    scored = llm.generate(prompts, SamplingParams(**greedy, max_tokens=1, prompt_logprobs=-1))
    plain = SamplingParams(**greedy, max_tokens=job["new_tokens"])
    runs = [llm.generate(prompts, plain) for _ in range(2)]
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "logprobs": [
            [[place[t].logprob for t in sorted(place)] for place in output.prompt_logprobs[1:]]
            for output in scored
        ],
        "tokens": [[list(output.outputs[0].token_ids) for output in run] for run in runs],
        "cached": sum(output.num_cached_tokens for output in runs[-1]),
        "models": llm.apply_model(describe),
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "ours": sorted(name for name in sys.modules if name.startswith("torch_plugins")),
    }


def refuse(job: dict[str, Any]) -> dict[str, Any]:
    """The error of each set of options, or None where there is none."""
    errors: list[str | None] = []
    for options in job["refused"]:
        try:
            build(job, options)
            errors.append(None)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors}


if __name__ == "__main__":
    what = json.loads(Path(sys.argv[1]).read_text())
    result = refuse(what) if what["refused"] else compute(what)
    Path(sys.argv[2]).write_text(json.dumps(result))
