"""transformers' OpenAI-compatible server on our kernels, asked by real clients on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from saved_models import SHAPE, TEMPLATE, wide
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from llmfast.data import build_tokenizer, load_tokenizer
from llmfast.generate import chat_ids
from llmfast.models import GPT

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"needs the package {package} (transformers[serving])")

QUESTION = [{"role": "user", "content": "the quick fox?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a chat template, in float32."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("served")
    hf = build_tokenizer("bpe", [f"the quick brown fox number {n}\n" for n in range(50)], vocab_size=290).hf
    hf.add_special_tokens(["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=hf, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = wide(AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)})))
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """Its address; a process of its own, as users start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llmfast.integrations.serve", str(folder), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LLMFAST_STRICT": "1"}
    log = folder / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def expected(folder):
    """What the same weights say by our own loop."""
    tokenizer, model = load_tokenizer(folder), GPT.from_pretrained(folder)
    ids = torch.tensor([chat_ids(tokenizer, QUESTION)])
    return tokenizer.decode(model.generate(ids, max_new_tokens=12, temperature=0)[0, ids.shape[1] :])


def test_openais_client(server, folder, expected):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    request = {"model": str(folder), "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content.strip() == expected.strip()
    pieces = client.chat.completions.create(**request, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text.strip() == expected.strip()


def test_plain_http(server, folder, expected):
    body = {"model": str(folder), "messages": QUESTION, "max_tokens": 12, "temperature": 0, "stream": False}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.loads(response.read())
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()


def test_what_the_server_cannot_have():
    from llmfast.integrations.serve import main

    with pytest.raises(SystemExit, match="--attn-implementation: not for llmfast's server"):
        main(["model", "--attn-implementation", "sdpa"])


def test_without_transformers(monkeypatch):
    from llmfast import integrations
    from llmfast.integrations.serve import main

    monkeypatch.delattr(integrations, "transformers", raising=False)
    for name in [name for name in sys.modules if name.startswith("llmfast.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="transformers: not installed, expected version 5"):
        main(["model"])
