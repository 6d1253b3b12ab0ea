"""One request to vLLM's OpenAI server, started as a user starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request

from tests.serve.conftest import ENVIRONMENT, NEW_TOKENS, ROOT, TIMEOUT

NAME = "cla3-ladder"


def ask(port, prompt):
    body = {
        "model": "decoder",
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)["choices"][0]["token_ids"]


def test_a_completion_over_http(folder, reference):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", folder / NAME, "--served-model-name", "decoder", "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    environment = os.environ | ENVIRONMENT
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    server = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = threading.Timer(TIMEOUT, server.kill)
    watch.start()
    try:
        log = []
        for line in server.stdout:
            log.append(line)
            if "Application startup complete" in line:
                break
        else:
            raise AssertionError("".join(log)[-4000:])
        expected = reference(NAME)
        assert ask(port, expected["prompts"][2]) == expected["tokens"][2]
    finally:
        watch.cancel()
        server.terminate()
        server.communicate(timeout=TIMEOUT)
