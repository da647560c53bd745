"""The packaged checkpoint's language model in a running vLLM, fed with our prompts: `make test-vllm`.

vLLM has an environment of its own, whose Python VLLM_PYTHON names; without it these tests are skipped.
"""

import os
import re
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import load_script
from transformers import GenerationConfig

import modeling_vikdf
from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.backbones import BackboneNotFoundError, locate_backbone
from modeling_vikdf.pipeline_vikdf import prompt_embeddings


if not os.environ.get("VLLM_PYTHON"):
    pytest.skip("VLLM_PYTHON names no environment that has vLLM; `make test-vllm` does", allow_module_level=True)
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from fastapi.testclient import TestClient  # noqa: E402
from test_server import CHAT, SECRET, answer, body, streamed, text_of  # noqa: E402

from modeling_vikdf.server import connect, create_app, encode_prompt_embeddings  # noqa: E402


LOADING = 900  # seconds that vLLM may take to start
CHATS = [[{"role": "user", "content": text}] for text in load_script("speed/compare_servers").SENTENCES]
GREEDY = {"temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def parts():
    """In float32, in which greedy replies do not hang on rounding."""
    source = modeling_vikdf.DEFAULT_CHECKPOINT
    try:
        model = VikdfForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    except BackboneNotFoundError as error:
        pytest.skip(str(error))
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2, do_sample=False, max_new_tokens=40)
    return model, VikdfProcessor.from_pretrained(source)


@pytest.fixture(scope="module")
def vllm(parts, tmp_path_factory):
    """The address of a vLLM that runs the model's language model, as docs/serving.md says, but in float32."""
    folder = tmp_path_factory.mktemp("vllm")
    language_model = locate_backbone(parts[0].config.backbones["language_model"]["repo_id"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    module = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--enable-prompt-embeds"]
    command = [*module, "--model", language_model, "--port", str(port), "--api-key", SECRET, "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + LOADING
        while not answers(url):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-5000:]
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # it has children
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def client(parts, vllm):
    with TestClient(create_app(*parts, engine=connect(vllm, parts[0], SECRET))) as client:
        yield client


@pytest.fixture(scope="module")
def expected(parts):
    """What our own `generate` replies to each chat alone: its tokens."""
    model, processor = parts
    replies = []
    for chat in CHATS:
        inputs = processor([chat])
        replies.append(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist())
    return replies


def test_the_same_greedy_tokens(parts, vllm, expected):
    """As a client of vLLM alone gets them, with the body that docs/serving.md shows."""
    model, processor = parts
    with httpx.Client(base_url=vllm, headers={"Authorization": f"Bearer {SECRET}"}, timeout=300) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        for chat, tokens in zip(CHATS, expected, strict=True):
            request = {
                "model": name,
                "prompt_embeds": encode_prompt_embeddings(prompt_embeddings(model, processor, chat)),
                "return_token_ids": True,
                "logit_bias": {str(processor.knowledge_token_id): -100},
                **GREEDY,
            }
            reply = client.post("/v1/completions", json=request).raise_for_status().json()
            assert reply["choices"][0]["token_ids"] == tokens, chat


def test_16_clients_at_once_get_their_own_replies(parts, client, expected):
    with ThreadPoolExecutor(len(CHATS)) as pool:
        found = [*pool.map(lambda chat: answer(client, chat, **GREEDY), CHATS)]
    decoded = parts[1].batch_decode(expected, skip_special_tokens=True)
    assert [text_of(reply) for reply in found] == [text.strip() for text in decoded]
    assert [reply["usage"]["completion_tokens"] for reply in found] == [len(tokens) for tokens in expected]


def test_streams_stops_and_seeds(client):
    whole = text_of(answer(client, CHATS[0], **GREEDY))
    text, _, pieces = streamed(client, CHATS[0], **GREEDY)
    assert text == whole and pieces > 5
    stop = whole[len(whole) // 2 :][:4]
    assert text_of(answer(client, CHATS[0], stop=stop, **GREEDY)) == whole[: whole.index(stop)].strip()
    sampled = [text_of(answer(client, CHATS[0], temperature=1.2, top_p=0.95, seed=seed)) for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len({*sampled}) > 1
    assert text_of(answer(client, CHATS[0], use_knowledge=False, **GREEDY)) != whole


def test_a_reply_that_nobody_waits_for_ends(parts, vllm):
    before = metric(vllm, "generation_tokens_total")
    with TestClient(create_app(*parts, engine=connect(vllm, parts[0], SECRET), timeout=2)) as client:
        client.post(CHAT, json=body(CHATS[0], temperature=2, seed=1, max_tokens=900))  # 504, or what there is
        end = time.monotonic() + 60
        while metric(vllm, "num_requests_running"):
            assert time.monotonic() < end
            time.sleep(0.1)
    assert metric(vllm, "generation_tokens_total") - before < 900


def metric(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.M))


def test_a_wrong_key_is_told(parts, vllm):
    with pytest.raises(ValueError, match="401"):
        connect(vllm, parts[0], "wrong")
