"""`vikdf serve`: the answers are the pipeline's, alone or in batches; nothing that is sent breaks it or is logged."""

import asyncio
import base64
import io
import json
import logging
import re
import runpy
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import build_from
from PIL import Image
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

import modeling_vikdf
from modeling_vikdf.cli import main


pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from modeling_vikdf.pipeline_vikdf import prompt_embeddings  # noqa: E402
from modeling_vikdf.processing_vikdf import read_picture  # noqa: E402
from modeling_vikdf.server import app, connections, limits, schema, worker  # noqa: E402
from modeling_vikdf.server.app import create_app, encode_prompt_embeddings  # noqa: E402
from modeling_vikdf.server.worker import Job, Metrics, Worker  # noqa: E402


LOAD_SERVER = runpy.run_path(Path(modeling_vikdf.__file__).parents[1] / "eval" / "speed" / "load_server.py")
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is your dog doing?"}]
LONGER = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "I went to the beach yesterday and the water was so blue!"},
    {"role": "assistant", "content": "Look at the sky."},
    {"role": "user", "content": "It is snowing outside."},
]
CHATS = [QUESTION, LONGER, QUESTION + LONGER[2:], LONGER[1:2], LONGER[3:]]
SECRET = "a-secret-key"


@pytest.fixture(scope="module", params=[("qwen", "separate"), ("llama", "clip")], ids="-".join)
def parts(request, backbones):
    model, processor = build_from(backbones, *request.param, dtype=torch.float32)
    # every reply is as long as it may be, and no random bytes
    never = [2, *(id_ for token, id_ in processor.tokenizer.get_vocab().items() if token.startswith("<0x"))]
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=8, suppress_tokens=never
    )
    model.attach_vision_encoder()
    return model, processor


@pytest.fixture(scope="module")
def pipe(parts):
    model, processor = parts
    return pipeline("vikdf-dialogue", model=model, processor=processor, return_full_text=False)


@contextmanager
def serving(parts, **settings):
    with TestClient(create_app(*parts, **settings)) as client:
        yield client


@pytest.fixture(scope="module")
def client(parts):
    with serving(parts) as client:
        yield client


@contextmanager
def running(application, **settings):
    """An application in a real server, on a port of its own; its address."""
    config = uvicorn.Config(application, port=0, log_level="error", timeout_graceful_shutdown=1, **settings)
    real = uvicorn.Server(config)
    thread = threading.Thread(target=real.run)
    thread.start()
    while not real.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{real.servers[0].sockets[0].getsockname()[1]}"
    finally:
        real.should_exit = True
        thread.join()


def listening(parts, **settings):
    """The server as `vikdf serve` runs it; its address."""
    guarded = {"http": connections.GuardedProtocol, "backlog": connections.BACKLOG, "ws": "none"}
    return running(create_app(*parts, **settings), **guarded)


@contextmanager
def held(model):
    """The model stops in front of each step while the event is not set; the list counts the steps."""
    go, steps = threading.Event(), []

    def wait(*_):
        steps.append(time.monotonic())
        assert go.wait(20)

    handle = model.register_forward_pre_hook(wait)
    try:
        yield go, steps
    finally:
        go.set()
        handle.remove()


@contextmanager
def slowed(model, seconds):
    """Each step takes some time; the list counts the steps."""
    steps = []

    def wait(*_):
        steps.append(time.monotonic())
        time.sleep(seconds)

    handle = model.register_forward_pre_hook(wait)
    try:
        yield steps
    finally:
        handle.remove()


def body(messages=QUESTION, **settings) -> dict:
    return {"model": "vikdf", "messages": messages, **settings}


def answer(client, messages=QUESTION, **settings) -> dict:
    response = client.post(CHAT, json=body(messages, **settings))
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def events(response) -> list[dict]:
    """The chunks of a streamed answer."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def streamed(client, messages=QUESTION, **settings) -> tuple[str, str, int]:
    """Text, finish reason and number of pieces of a streamed reply."""
    chunks = events(client.post(CHAT, json=body(messages, stream=True, **settings)))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-1]]
    assert all(pieces) and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    return "".join(pieces), chunks[-1]["choices"][0]["finish_reason"], len(pieces)


def metrics(client) -> dict[str, float]:
    return read_metrics(client.get("/metrics").text)


def read_metrics(page: str) -> dict[str, float]:
    samples = (line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    return {name: float(value) for name, value in samples}


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def refused(response, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert re.search(message, error["message"]), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


# ---- the answers ----


def test_broken_characters_are_the_pipelines_too(parts, pipe):
    config = GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=30)
    with patch.object(parts[0], "generation_config", config), serving(parts) as client:
        for messages in CHATS:
            assert text_of(answer(client, messages)) == pipe(messages, generation_config=config)[0]["generated_text"]
            assert streamed(client, messages)[0]


@pytest.mark.parametrize("messages", CHATS)
def test_the_answer_is_the_pipelines(client, pipe, messages):
    found = answer(client, messages, max_tokens=12)
    assert text_of(found) == pipe(messages, max_new_tokens=12)[0]["generated_text"]
    assert found["object"] == "chat.completion" and found["model"] == "vikdf"
    assert found["choices"][0]["finish_reason"] == "length"
    prompt = pipe.processor([messages])["input_ids"].shape[1]
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


@pytest.mark.parametrize(
    "given, settings",
    [
        ({}, {}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"use_knowledge": False}, {"use_knowledge": False}),
        ({"num_beams": 3, "max_tokens": 6}, {"num_beams": 3, "max_new_tokens": 6}),
        ({"temperature": 0, "top_p": 0.5, "seed": 1}, {}),
    ],
)
def test_settings_reach_the_model(client, pipe, given, settings):
    expected = pipe(LONGER, **settings)[0]["generated_text"]
    assert text_of(answer(client, LONGER, **given)) == expected
    assert streamed(client, LONGER, **given)[0] == expected


def test_contents_as_parts_and_the_developers_role(client):
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in LONGER]
    parts[0]["role"] = "developer"
    assert text_of(answer(client, parts)) == text_of(answer(client, LONGER))


def test_nulls_and_neutral_settings_count_as_absent(client):
    neutral = {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "a", "stop": []}
    nothing = dict.fromkeys(("temperature", "tools", "max_tokens", "seed", "stream", "response_format"))
    assert text_of(answer(client, **neutral, **nothing)) == text_of(answer(client))
    appended = [{**QUESTION[0], "name": None, "tool_calls": None}]
    assert text_of(answer(client, appended)) == text_of(answer(client))


def test_a_seed_makes_draws_repeatable(client, pipe):
    sampling = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 10}
    found = text_of(answer(client, seed=7, **sampling))
    wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)  # then the generator is as it was before
    torch.manual_seed(7)
    drawn = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0, "max_new_tokens": 10}
    assert pipe(QUESTION, **drawn)[0]["generated_text"] == found == text_of(answer(client, seed=7, **sampling))
    assert len({text_of(answer(client, seed=seed, **sampling)) for seed in range(4)}) > 1
    assert len({text_of(answer(client, **sampling)) for _ in range(4)}) > 1


def test_the_end_of_a_turn_ends_the_reply(parts, pipe):
    model, _ = parts
    whole = pipe.model.generate(**pipe.processor([QUESTION]))[0, -8:].tolist()
    config = GenerationConfig(**{**model.generation_config.to_diff_dict(), "eos_token_id": [2, whole[4]]})
    with patch.object(model, "generation_config", config), serving(parts) as client:
        found = answer(client)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == whole.index(whole[4]) + 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_stop_texts(client, size):
    whole = text_of(answer(client, LONGER, max_tokens=30))
    stop = whole[len(whole) // 2 :][:size]
    expected = whole[: whole.index(stop)].strip()
    for given in (stop, ["never in it", stop]):
        found = answer(client, LONGER, max_tokens=30, stop=given)
        assert (text_of(found), found["choices"][0]["finish_reason"]) == (expected, "stop")
        assert found["usage"]["completion_tokens"] <= 30
        assert streamed(client, LONGER, max_tokens=30, stop=given)[:2] == (expected, "stop")


# ---- streaming ----


@pytest.mark.parametrize("messages", CHATS[:3])
def test_streamed_is_what_comes_at_once_otherwise(client, messages):
    whole = text_of(answer(client, messages, max_tokens=20))
    text, reason, pieces = streamed(client, messages, max_tokens=20)
    assert (text, reason) == (whole, "length") and pieces > 3


def test_the_usage_of_a_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = events(client.post(CHAT, json=body(**options)))
    assert last["choices"] == [] and last["usage"] == answer(client)["usage"]


def test_no_proxy_holds_a_stream_back(client):
    headers = client.post(CHAT, json=body(stream=True)).headers
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


def test_text_comes_when_it_can_not_change_any_more():
    told = []
    job = Job(None, None, 100, ("END", "ENOUGH"), 0.0, None)
    job.emit = told.append
    steps = ["Hi", "Hi ", "Hi \ufffd", "Hi é", "Hi é E", "Hi é Et", "Hi é Et EN", "Hi é Et ENO", "Hi é Et ENOUGH x"]
    for _ in steps:
        job.append(0, False, lambda ids: steps[len(ids) - 1])
    assert [update.text for update in told] == ["Hi", " é", " Et", ""]
    assert told[-1].finish_reason == "stop" and job.replies[0].text == "Hi é Et"


# ---- batches ----


def test_what_waits_is_answered_together_as_if_alone(parts, pipe):
    requests = [
        body(messages, max_tokens=tokens, stream=stream, stop=stop)
        for messages, tokens, stream, stop in zip(
            CHATS + CHATS[:3], (12, 3, 7, 1, 12, 5, 9, 12), [True, False] * 4, ["x"] + [[]] * 7, strict=True
        )
    ]
    with serving(parts, max_batch=4) as client, ThreadPoolExecutor(9) as pool:
        alone = [client.post(CHAT, json=request) for request in requests]
        with held(parts[0]) as (go, steps):
            first = pool.submit(client.post, CHAT, json=body())
            wait_until(lambda: steps)
            waiting = [pool.submit(client.post, CHAT, json=request) for request in requests]
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 8)
            go.set()
            together = [future.result() for future in waiting]
        assert text_of(first.result().json()) == text_of(answer(client))
        figures = metrics(client)
    for request, one, other in zip(requests, alone, together, strict=True):
        if request["stream"]:
            assert [chunk["choices"] for chunk in events(one)] == [chunk["choices"] for chunk in events(other)]
        else:
            assert one.json()["choices"] == other.json()["choices"] and one.json()["usage"] == other.json()["usage"]
    assert figures["vikdf_batch_size_count"] == 8 + 1 + 2 + 1
    assert figures["vikdf_batch_size_sum"] == 8 + 1 + 8 + 1
    assert figures['vikdf_batch_size_bucket{le="2.0"}'] == 10


def test_only_what_agrees_shares_a_batch(parts):
    seeded = {"temperature": 1.0, "seed": 1}
    kinds = [{}, {"use_knowledge": False}, {"num_beams": 2}, {"num_beams": 2, "max_tokens": 3}, {"temperature": 0.7}]
    requests = [*kinds, *kinds, seeded, seeded]
    with serving(parts) as client, ThreadPoolExecutor(20) as pool:
        alone = [text_of(answer(client, **kind)) for kind in (*kinds[:4], seeded)]
        spy = patch.object(type(parts[0]), "generate", autospec=True, side_effect=type(parts[0]).generate)
        with held(parts[0]) as (go, steps), spy as generate:
            pool.submit(answer, client)
            wait_until(lambda: steps)
            waiting = [pool.submit(answer, client, **kind) for kind in requests]
            knowledge = [pool.submit(client.post, "/v1/knowledge", json=body()) for _ in range(2)]
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 14)
            go.set()
            found = [text_of(future.result()) for future in waiting]
            assert all(future.result().status_code == 200 for future in knowledge)
            sizes = [len(call.kwargs["input_ids"]) for call in generate.call_args_list]
    assert sorted(sizes) == [1, 1, 1, 2, 2, 2, 2, 2]  # the first, both seeded ones, and five pairs
    assert found[:4] == found[5:9] == alone[:4] and found[10] == found[11] == alone[4]


def test_rows_that_do_not_fit_into_the_window_together_are_not_put_together(parts):
    long = [{"role": "user", "content": "the water was so blue! " * 12}]
    with serving(parts) as client, ThreadPoolExecutor(3) as pool:
        length = answer(client, long)["usage"]["prompt_tokens"]
        tokens = 512 - length + 1
        with held(parts[0]) as (go, steps):
            waiting = [pool.submit(answer, client)]
            wait_until(lambda: steps)
            waiting += [pool.submit(answer, client, long), pool.submit(answer, client, max_tokens=tokens)]
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 2)
            go.set()
            assert [each.result()["usage"]["completion_tokens"] for each in waiting] == [8, 8, tokens]
        assert metrics(client)['vikdf_batch_size_bucket{le="1.0"}'] == 4


def test_many_clients_at_once(parts):
    contexts = [{"role": "user", "content": "the water was so blue! " * 6}, *LONGER[2:]]  # more than CLIP reads
    chats = [*CHATS, contexts, QUESTION + contexts[1:]]
    with serving(parts, max_batch=4) as client, ThreadPoolExecutor(12) as pool:
        alone = [text_of(answer(client, chat, max_tokens=6)) for chat in chats]
        order = [Random(seed).randrange(len(chats)) for seed in range(72)]
        found = pool.map(lambda number: text_of(answer(client, chats[number], max_tokens=6)), order)
        assert list(found) == [alone[number] for number in order]


# ---- pictures and knowledge ----


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 36), colour)


def data_url(image: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def with_picture(url: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *text_part("Look!")]}]


def text_part(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


def test_pictures_alone_and_beside_chats_without(parts, pipe):
    look = [{"role": "user", "content": "Look!"}]
    expected = [pipe(look, images=picture("red")), pipe(QUESTION), pipe(look, images=picture("blue"))]
    requests = [with_picture(data_url(picture("red"))), QUESTION, with_picture(data_url(picture("blue")))]
    with serving(parts) as client, ThreadPoolExecutor(4) as pool:
        assert [text_of(answer(client, request)) for request in requests] == [
            each[0]["generated_text"] for each in expected
        ]
        with held(parts[0]) as (go, steps):
            pool.submit(answer, client)
            wait_until(lambda: steps)
            waiting = [pool.submit(answer, client, request) for request in requests]
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 3)
            go.set()
            assert [text_of(each.result()) for each in waiting] == [each[0]["generated_text"] for each in expected]
        assert metrics(client)["vikdf_batch_size_sum"] == 7 and metrics(client)["vikdf_batch_size_count"] == 5


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://127.0.0.1:9/cat.png", "fetches nothing"),
        ("https://example.org/cat.png", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("/etc/passwd", "fetches nothing"),
        ("data:image/png,AAAA", "data: URL"),
        ("data:image/png;base64,AAAA", "not a complete PNG"),
        (data_url(picture("red"))[:-40], "not a complete PNG"),
        (data_url(picture("red"), "ICO"), "not a complete PNG"),
        (data_url(Image.new("1", (6000, 5000))), "6000 x 5000 pixels"),
    ],
)
def test_pictures_that_are_refused(client, url, message):
    with patch.object(socket, "getaddrinfo", side_effect=AssertionError("fetched")):
        refused(client.post(CHAT, json=body(with_picture(url))), 400, message)


def test_two_pictures_or_no_eyes(parts, client):
    two = with_picture(data_url(picture("red"))) * 2
    refused(client.post(CHAT, json=body([two[0], LONGER[2], two[1]])), 400, "2 pictures")
    with patch.object(parts[0], "vision_encoder", None):
        refused(client.post(CHAT, json=body(two[:1])), 400, "accepts no pictures")
    with patch.object(parts[1], "image_processor", None):
        refused(client.post(CHAT, json=body(two[:1])), 400, "without image_processor")


@pytest.mark.parametrize("messages", [QUESTION, LONGER, with_picture(data_url(picture("red")))])
def test_knowledge(parts, client, messages):
    model, processor = parts
    image = picture("red") if isinstance(messages[0]["content"], list) else None
    inputs = processor(
        [[{"role": "user", "content": "Look!"}]] if image else [messages], images=[image] if image else None
    )
    with torch.no_grad():
        knowledge = model.get_knowledge(
            inputs["context_input_ids"], inputs["context_attention_mask"], inputs.get("pixel_values")
        )
        projected = model.project_knowledge(knowledge)
    for encoding in ("float", "base64"):
        response = client.post("/v1/knowledge", json=body(messages, encoding_format=encoding))
        assert response.status_code == 200, response.text
        for name, expected in (("knowledge", knowledge[0]), ("projected", projected[0])):
            found = response.json()[name]
            data = found["data"]
            if encoding == "base64":
                data = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.float32).reshape(found["shape"])
            torch.testing.assert_close(torch.as_tensor(data), expected)
            assert found["shape"] == list(expected.shape)


# ---- what is refused ----


@pytest.mark.parametrize(
    "wrong, status, message",
    [
        ({"model": "gpt-4"}, 404, "no such model"),
        ({"messages": []}, 400, "messages: .*at least 1"),
        ({"messages": "Hello"}, 400, "messages: .*list"),
        ({"messages": None}, 400, "messages: .*required"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role: .*'system'"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "message 0: the content is empty"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: .*required"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, 400, "tool_calls: not supported"),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "no user message"),
        ({"messages": [{"role": "user", "content": "the water was so blue! " * 100}]}, 400, "tokens; at most"),
        ({"messages": [{"role": "user", "content": "a" * 200_001}]}, 413, "200001 characters"),
        ({"max_tokens": -1}, 400, "max_tokens: .*greater than or equal to 1"),
        ({"max_tokens": 100_000}, 400, "max_tokens=100000 leaves no room"),
        ({"temperature": 3}, 400, "temperature: "),
        ({"n": 2}, 400, "n=2 needs a temperature above 0"),
        ({"logprobs": "yes"}, 400, "logprobs: "),
        ({"tools": [{}]}, 400, "tools: not supported by this server"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format: not supported"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream: "),
        ({"encoding_format": "float"}, 400, "encoding_format: not supported"),
    ],
)
def test_clear_refusals(client, wrong, status, message):
    refused(client.post(CHAT, json={**body(), **wrong}), status, message)


BEGUN = [*QUESTION, {"role": "assistant", "content": "He is"}]


def test_a_reply_that_is_begun_is_continued(client, pipe):
    (expected,) = pipe(BEGUN)
    settings = {"max_tokens": 8}
    answer = client.post(CHAT, json=body(BEGUN, **settings)).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected["generated_text"]}
    assert client.post(CHAT, json=body(BEGUN, continue_final_message=True)).json()["choices"] == answer["choices"]
    lines = client.post(CHAT, json=body(BEGUN, stream=True, **settings)).text.split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines if "{" in line]
    assert "".join(pieces) == expected["generated_text"] != pipe(QUESTION)[0]["generated_text"]
    refused(client.post(CHAT, json=body(continue_final_message=True)), 400, "the last message is the user's")


def test_another_reply_behind_a_reply(client, pipe):
    if "INST" in pipe.processor.chat_template:
        pytest.skip("Llama's template has no prompt for a second reply")
    answer = client.post(CHAT, json=body(BEGUN, continue_final_message=False)).json()
    expected = pipe(BEGUN, continue_final_message=False)[0]["generated_text"]
    assert answer["choices"][0]["message"]["content"] == expected


def test_a_continued_reply_keeps_the_space_in_front_of_it(parts):
    processor = parts[1]
    job = Job(processor([BEGUN]), None, 9, (), 0.0, None, continued=True)
    job.emit = lambda update: None
    last = job.features["input_ids"][0, -1:].tolist()
    token = processor.tokenizer(" a a", add_special_tokens=False)["input_ids"][-1]
    job.append(token, False, partial(processor.decode_behind, last, skip_special_tokens=True))
    assert job.replies[0].text == " a"


@pytest.mark.parametrize("typed", ["placeholder", "\ud83d"])
def test_reserved_tokens_and_half_characters_are_text(parts, client, typed):
    typed = parts[1].knowledge_token if typed == "placeholder" else typed
    chat = [{"role": "user", "content": f"a {typed} b"}]
    response = client.post(CHAT, content=json.dumps(body(chat)), headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"model": "\\ud800"}', b"1" * 5000])
def test_bodies_that_are_no_json(client, content):
    refused(client.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400, "")


def test_other_content_types_paths_and_methods(client):
    # a page in a browser may send plain text to this machine without asking
    refused(client.post(CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"}), 400, "")
    refused(client.get("/v1/nothing"), 404, "Not Found")
    refused(client.get(CHAT), 405, "Method Not Allowed")


def test_malformed_requests_never_break_it(client):
    random, expected = Random(0), text_of(answer(client))
    for number in range(300):
        content = LOAD_SERVER["malformed_body"](random, "vikdf")
        response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 404, 413), (response.status_code, content[:300])
        assert response.json()["error"]["message"]
        if number % 50 == 0:
            assert text_of(answer(client)) == expected
    assert text_of(answer(client)) == expected


@pytest.mark.parametrize("path", [CHAT, "/v1/knowledge"])
def test_bodies_that_are_too_large(client, path):
    content = json.dumps(body([{"role": "user", "content": "a" * 9 * 2**20}])).encode()
    refused(client.post(path, content=content, headers={"Content-Type": "application/json"}), 413, "bytes")
    pieces = (content[start : start + 2**16] for start in range(0, len(content), 2**16))
    refused(client.post(path, content=pieces, headers={"Content-Type": "application/json"}), 413, "bytes")


@pytest.mark.parametrize("text", ["a" * 200_000, "é😀" * 100_000, "a " * 100_000, "\n" * 199_999 + "a"])
def test_large_texts_cost_little_time(client, text):
    start = time.process_time()  # whatever else the machine does
    response = client.post(CHAT, json=body([{"role": "user", "content": text}]))
    assert response.status_code in (200, 400), response.text  # some templates strip
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRET}", SECRET, f"Bearer {SECRET}x", "Bearer é"],
)
def test_the_key(parts, given):
    with serving(parts, api_key=SECRET) as client:
        headers = {} if given is None else {"Authorization": given.encode()}
        for path in (CHAT, "/v1/knowledge", "/v1/models", "/v1/nothing"):
            response = client.post(path, content=b"{", headers=headers)
            refused(response, 401, "API key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        right = {"Authorization": f"Bearer {SECRET}"}
        assert client.post(CHAT, json=body(), headers=right).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": ""},
        {"max_batch": 0},
        {"max_batch_tokens": 0},
        {"max_queue": -1},
        {"timeout": 0},
        {"max_client_requests": 0},
    ],
)
def test_settings_that_make_no_sense(parts, wrong):
    with pytest.raises(ValueError, match="API key|positive"):
        create_app(*parts, **wrong)


# ---- too much, too late, gone ----


def test_a_full_queue(parts):
    with serving(parts, max_queue=2) as client, ThreadPoolExecutor(3) as pool:
        with held(parts[0]) as (go, steps):
            waiting = [pool.submit(answer, client)]
            wait_until(lambda: steps)
            waiting += [pool.submit(answer, client), pool.submit(answer, client, LONGER)]
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 2)
            for path in (CHAT, "/v1/knowledge"):
                response = client.post(path, json=body())
                refused(response, 429, "Too many")
                assert int(response.headers["retry-after"]) >= 1
            go.set()
            assert all(text_of(future.result()) for future in waiting)
        assert text_of(answer(client))


def test_a_reply_that_is_not_done_in_time_ends_early(parts):
    with serving(parts, timeout=2.0) as client, slowed(parts[0], 0.1) as steps:
        whole = text_of(answer(client, max_tokens=8))
        found = answer(client, max_tokens=400)
        assert found["choices"][0]["finish_reason"] == "length" and 0 < found["usage"]["completion_tokens"] < 30
        assert text_of(found)[:5] == whole[:5]
        text, reason, _ = streamed(client, max_tokens=400)
        assert text[:5] == whole[:5] and reason == "length"
        assert len(steps) < 60
        assert text_of(answer(client, max_tokens=8)) == whole


def test_a_beam_search_that_is_not_done_in_time_is_given_up(parts):
    with serving(parts, timeout=0.5) as client, slowed(parts[0], 0.02) as steps:
        for stream in (False, True):
            refused(
                client.post(CHAT, json=body(num_beams=3, max_tokens=300, stream=stream)), 504, "before the deadline"
            )
        wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)
        assert len(steps) < 100
        assert text_of(answer(client, num_beams=3, max_tokens=3))


def test_the_best_of_some_candidates(parts):
    how = {"temperature": 1.0, "seed": 3, "num_candidates": 4, "max_tokens": 6}
    weights = partial(patch.object, parts[0].generation_config, "candidate_weights", create=True)
    with serving(parts) as client:
        with weights({"likelihood": 1.0, "match": 1.0}):
            best = text_of(answer(client, **how))
            assert streamed(client, **how)[0] == best  # which comes in one piece
        with weights({"likelihood": -1.0, "match": -1.0}):
            assert text_of(answer(client, **how)) != best
        refused(client.post(CHAT, json=body(num_candidates=4, temperature=0)), 400, "temperature above 0")
        refused(client.post(CHAT, json=body(num_candidates=4, temperature=1.0, num_beams=2)), 400, "num_beams=1")
        refused(client.post(CHAT, json=body(num_candidates=99)), 400, "num_candidates")


def test_what_waits_too_long_is_told_so(parts):
    with serving(parts, timeout=1.0) as client, held(parts[0]) as (go, steps), ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, CHAT, json=body(stream=True))
        wait_until(lambda: steps)  # what comes later finds the model busy
        rest = [pool.submit(client.post, path, json=body()) for path in (CHAT, "/v1/knowledge")]
        for future in (first, *rest):
            refused(future.result(), 504, "before the deadline")
        assert metrics(client)["vikdf_queue_length"] == 0
        go.set()
        assert text_of(answer(client))
        assert len(steps) < 20  # nobody generated what nobody waits for


def test_a_client_that_leaves_ends_its_row_and_no_other(parts):
    model, _ = parts
    with listening(parts) as url, httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(2) as pool:
        expected = text_of(answer(client, LONGER, max_tokens=40))
        with held(model) as (go, begun):
            pool.submit(answer, client)
            wait_until(lambda: begun)
            leaver = httpx.Client(base_url=url, timeout=30)
            stream = leaver.stream("POST", CHAT, json=body(stream=True, max_tokens=300))
            entering = pool.submit(stream.__enter__)
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 1)
            with ThreadPoolExecutor(1) as other:
                stays = other.submit(answer, client, LONGER, max_tokens=40)
                wait_until(lambda: metrics(client)["vikdf_queue_length"] == 2)
                with slowed(model, 0.01) as steps:
                    go.set()
                    next(entering.result().iter_text())
                    leaver.close()
                    wait_until(lambda: 'vikdf_requests_total{status="499"}' in metrics(client))
                    assert text_of(stays.result()) == expected
                    wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)
        assert len(steps) < 100 and metrics(client)["vikdf_batch_size_sum"] == 4


def test_a_client_that_leaves_before_it_gets_anything(parts):
    model, _ = parts
    with listening(parts) as url, slowed(model, 0.01) as steps, httpx.Client(base_url=url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=body(max_tokens=400), timeout=1.0)
        wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)
        assert 0 < len(steps) < 200
        with held(model) as (go, begun), ThreadPoolExecutor(1) as pool:
            first = pool.submit(answer, client)
            wait_until(lambda: begun)
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/knowledge", json=body(), timeout=1.0)
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 0)  # nor does it wait any more
            go.set()
            assert first.result()
        wait_until(lambda: metrics(client).get('vikdf_requests_total{status="499"}') == 2)


def test_a_request_that_never_arrives_whole(parts):
    with listening(parts, timeout=0.5) as url:
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=10) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(head.encode() + b'{"model"')
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_model_that_fails_fails_once(parts, client):
    expected = text_of(answer(client))
    with patch.object(type(parts[0]), "generate", side_effect=RuntimeError("out of memory")):
        for stream in (False, True):
            refused(client.post(CHAT, json=body(stream=stream)), 500, "failed")
    with patch.object(type(parts[0]), "get_knowledge", side_effect=RuntimeError("out of memory")):
        refused(client.post("/v1/knowledge", json=body()), 500, "failed")
    assert text_of(answer(client)) == expected


def test_a_failure_in_the_middle_of_a_stream(parts, client):
    def fail(*_):
        calls.append(0)
        if len(calls) == 6:
            raise RuntimeError("out of memory")

    calls, handle = [], parts[0].register_forward_pre_hook(fail)
    try:
        *chunks, last = events(client.post(CHAT, json=body(stream=True, max_tokens=20)))
    finally:
        handle.remove()
    assert len(chunks) > 1 and "failed" in last["error"]["message"]


def test_an_error_nobody_expected(parts, client):
    with patch.object(type(parts[1]), "__call__", side_effect=RuntimeError("?")):
        refused(client.post(CHAT, json=body()), 500, "Internal")
    assert text_of(answer(client))


def test_shutting_down_ends_what_runs(parts):
    with ThreadPoolExecutor(1) as pool, slowed(parts[0], 0.02) as steps:
        with listening(parts) as url:
            future = pool.submit(httpx.post, url + CHAT, json=body(max_tokens=450), timeout=30)
            wait_until(lambda: steps)
        with pytest.raises(httpx.HTTPError):
            future.result().raise_for_status()
    assert len(steps) < 200


# ---- what is written down ----


def test_logs_hold_no_text_and_no_key(parts, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    word = "tomatoes"
    chat = [{"role": "user", "content": word}]
    headers = {"Authorization": f"Bearer {SECRET}"}
    with serving(parts, api_key=SECRET) as client:
        client.headers.update(headers)
        reply = text_of(answer(client, chat))
        streamed(client, chat)
        for wrong in (
            body([{"role": word, "content": word}]),
            body(chat, stop=[word, ""]),
            body(chat, max_tokens=word),
        ):
            refused(client.post(CHAT, json=wrong), 400, "")
        client.post(CHAT, json=body([{"role": "user", "content": f"{word} {parts[1].knowledge_token}"}]))
        client.get(f"/{word}?key={SECRET}&text={word}")
        client.post(CHAT, json=body(chat), headers={"Authorization": f"Bearer {word}"})
        client.post(CHAT, json=body([{"role": "user", "content": word + " the water was so blue!" * 100}]))
        with patch.object(type(parts[0]), "generate", side_effect=RuntimeError(word)):
            client.post(CHAT, json=body(chat))
        with patch.object(type(parts[1]), "__call__", side_effect=RuntimeError(word)):
            client.post(CHAT, json=body(chat))
        page = client.get("/metrics").text
    # what the test's own client logs is not the server's
    log = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    written = log + page + "".join(capsys.readouterr())
    assert "POST /v1/chat/completions 200" in log and "GET - 404" in log and "RuntimeError" in log
    for private in (word, SECRET, reply):
        assert private not in written


def test_metrics_add_up(parts):
    with serving(parts) as client:
        usages = [answer(client, chat, max_tokens=3 + i)["usage"] for i, chat in enumerate(CHATS)]
        streamed(client)
        for wrong in ({"n": 2}, {"model": "a"}, {"messages": []}):
            client.post(CHAT, json={**body(), **wrong})
        client.post("/v1/knowledge", json=body())
        pages = [client.get("/metrics").text]
        while "vikdf_running_requests 0" not in pages[-1]:
            pages.append(client.get("/metrics").text)
    found = read_metrics(pages[-1])
    assert found['vikdf_requests_total{status="200"}'] == 5 + 1 + 1 + len(pages) - 1  # a page does not count itself
    assert found['vikdf_requests_total{status="400"}'] == 2 and found['vikdf_requests_total{status="404"}'] == 1
    assert found["vikdf_completion_tokens_total"] == sum(each["completion_tokens"] for each in usages) + 8
    assert found["vikdf_prompt_tokens_total"] == sum(each["prompt_tokens"] for each in (*usages, usages[0]))
    assert found["vikdf_time_to_first_token_seconds_count"] == 6
    assert found['vikdf_time_to_first_token_seconds_bucket{le="+Inf"}'] == 6
    buckets = [value for name, value in found.items() if name.startswith("vikdf_time_to_first_token_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert found["vikdf_batch_size_count"] == found["vikdf_batch_size_sum"] == 7
    assert found["vikdf_queue_length"] == found["vikdf_running_requests"] == 0
    for line in pages[-1].splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]+"\})? [0-9.e+-]+', line), line


def test_a_prometheus_server_reads_the_metrics(parts):
    parser = pytest.importorskip("prometheus_client.parser")
    with serving(parts) as client:
        assert client.post(CHAT, json=body(max_tokens=1)).status_code == 200
        response = client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in parser.text_string_to_metric_families(response.text)}
    kinds = {name: family.type for name, family in families.items() if not name.endswith("_created")}
    memory = {"vikdf_resident_memory_bytes": "gauge"} if sys.platform == "linux" else {}
    assert kinds == memory | {
        "vikdf_requests": "counter",
        "vikdf_prompt_tokens": "counter",
        "vikdf_completion_tokens": "counter",
        "vikdf_queue_length": "gauge",
        "vikdf_running_requests": "gauge",
        "vikdf_batch_size": "histogram",
        "vikdf_time_to_first_token_seconds": "histogram",
    }
    labels = {name: {label for sample in families[name].samples for label in sample.labels} for name in kinds}
    assert labels.pop("vikdf_requests") == {"status"}
    assert {name for name, used in labels.items() if used == {"le"}} == {
        "vikdf_batch_size",
        "vikdf_time_to_first_token_seconds",
    }
    edges = {sample.labels.get("le") for sample in families["vikdf_batch_size"].samples} - {None}
    assert sorted(map(float, edges)) == [1, 2, 4, 8, 16, 32, float("inf")]


def test_servers_in_one_process_are_counted_apart(parts):
    with serving(parts) as one, serving(parts) as other:
        answer(one, max_tokens=3)
        assert metrics(one)["vikdf_completion_tokens_total"] == 3
        assert metrics(other)["vikdf_completion_tokens_total"] == 0


def test_the_load_script_reads_the_servers_memory(parts):
    async def memory_of(url):
        async with httpx.AsyncClient(base_url=url) as client:
            return await LOAD_SERVER["memory"](client)

    with listening(parts) as url:
        memory = asyncio.run(memory_of(url))
    assert memory > 2**20 if sys.platform == "linux" else memory is None


def test_health_and_models(client):
    assert CHAT in client.get("/openapi.json").json()["paths"]
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "vikdf" and model["object"] == "model"


def test_a_dead_worker_is_unhealthy(parts):
    with serving(parts) as client:
        assert client.get("/health").status_code == 200
    assert client.get("/health").status_code == 503  # its lifespan is over


# ---- one request does not stop the others ----


LARGE = with_picture(data_url(Image.new("1", (4000, 4000))))
TOO_LARGE = with_picture(data_url(Image.new("1", (6000, 5000))))


@pytest.mark.parametrize("path", [CHAT, "/v1/knowledge"])
def test_pictures_are_counted_before_one_is_decoded(client, path):
    several = [{"role": "user", "content": LARGE[0]["content"][:1] * 60}]
    with patch.object(Image.Image, "load", side_effect=AssertionError("decoded")):
        refused(client.post(path, json=body(several)), 400, "60 pictures; at most one")
        refused(client.post(path, json=body(TOO_LARGE)), 400, "6000 x 5000 pixels")


@pytest.mark.parametrize("path", [CHAT, "/v1/knowledge"])
def test_a_model_without_eyes_decodes_nothing(parts, client, path):
    decoded = patch.object(Image.Image, "load", side_effect=AssertionError("decoded"))
    with patch.object(parts[0], "vision_encoder", None), decoded:
        refused(client.post(path, json=body(LARGE)), 400, "accepts no pictures")


def test_one_picture_at_a_time_is_decoded_and_not_on_the_event_loop(parts):
    at_once, most, threads, guard = [], [], set(), threading.Lock()

    def watched(picture, *how):
        with guard:
            at_once.append(0)
            most.append(len(at_once))
            threads.add(threading.current_thread().name)
        time.sleep(0.01)  # others may come meanwhile
        with guard:
            at_once.pop()
        return read_picture(picture, *how)

    requests = [body(with_picture(data_url(picture("red")))) for _ in range(6)]
    with serving(parts) as client, ThreadPoolExecutor(6) as pool, patch.object(schema, "read_picture", watched):
        assert all(each.status_code == 200 for each in pool.map(lambda it: client.post(CHAT, json=it), requests))
    assert len(most) == 6 and max(most) == 1
    assert not any("asyncio-portal" in name or name == "MainThread" for name in threads)


def test_pictures_that_wait_to_be_decoded_are_in_the_queue(parts):
    begun, go = threading.Event(), threading.Event()

    def wait(picture, *how):
        begun.set()
        assert go.wait(20)
        return read_picture(picture, *how)

    shown = body(with_picture(data_url(picture("red"))))
    with serving(parts, max_queue=2) as client, ThreadPoolExecutor(6) as pool:
        with patch.object(schema, "read_picture", wait):
            asked = [pool.submit(client.post, CHAT, json=shown)]
            assert begun.wait(20)
            asked += [pool.submit(client.post, CHAT, json=shown) for _ in range(4)]
            wait_until(lambda: sum(each.done() for each in asked) == 3)
            go.set()
            assert sorted(each.result().status_code for each in asked) == [200, 200, 429, 429, 429]


def test_stop_sequences_are_short(client):
    refused(client.post(CHAT, json=body(stop="a" * 257)), 400, "stop.*256")
    refused(client.post(CHAT, json=body(stop=["a", "a" * 257])), 400, "stop.*256")
    assert answer(client, stop=["\u00e9" * 256] * 4)


class CountingText(str):
    """Text that counts the characters that are searched in it."""

    searched = 0

    def find(self, sub, start=0, *end):
        CountingText.searched += len(self) - start
        return super().find(sub, start, *end)


def test_stop_sequences_are_looked_for_in_what_is_new():
    job = Job(None, None, 10_000, ("never in it", "END"), 0.0, None)
    job.emit = lambda update: None
    CountingText.searched = 0
    for _ in range(1000):
        job.append(0, False, lambda ids: CountingText("abcd" * len(ids)))
    assert 0 < CountingText.searched < 2 * 1000 * 20  # not 2 * 4 * 500,000, all the text each time


def test_a_stop_sequence_in_pieces_is_found_where_it_begins():
    for pieces in ("a E N D b", "aE N Db", "aEN D", "a EEND", "\ufffd END"):
        told, steps = [], [pieces[: n + 1].replace(" ", "") for n, c in enumerate(pieces) if c != " "]
        job = Job(None, None, 100, ("END",), 0.0, None)
        job.emit = told.append
        for text in steps:
            if not job.finished:
                job.append(0, False, lambda ids, text=text: text)
        assert job.replies[0].text == pieces.replace(" ", "").partition("END")[0] and told[-1].finish_reason == "stop"


@pytest.mark.parametrize("more", [{"num_beams": 4}, {"num_candidates": 4, "temperature": 1.0}, {"max_tokens": 400}])
def test_what_never_fits_into_a_batch_is_refused(parts, more):
    with serving(parts) as client:
        tokens = 2 * answer(client)["usage"]["total_tokens"]
    with serving(parts, max_batch_tokens=tokens) as client:
        with patch.object(type(parts[0]), "generate", side_effect=AssertionError("generated")):
            refused(client.post(CHAT, json=body(**more)), 400, f"tokens; at most {tokens}")
        assert answer(client, num_beams=2)


def test_a_batch_has_no_more_tokens_than_its_budget(parts):
    with serving(parts) as client:
        length = answer(client)["usage"]["total_tokens"]
    with serving(parts, max_batch_tokens=4 * length) as client, ThreadPoolExecutor(8) as pool:
        for more, sizes in (({}, [1, 4, 3]), ({"num_beams": 2}, [1, 2, 2, 2, 1])):
            spy = patch.object(type(parts[0]), "generate", autospec=True, side_effect=type(parts[0]).generate)
            with held(parts[0]) as (go, steps), spy as generate:
                waiting = [pool.submit(answer, client, **more)]
                wait_until(lambda steps=steps: steps)
                waiting += [pool.submit(answer, client, **more) for _ in range(7)]
                wait_until(lambda: metrics(client)["vikdf_queue_length"] == 7)
                go.set()
                assert len({text_of(future.result()) for future in waiting}) == 1
                assert [len(call.kwargs["input_ids"]) for call in generate.call_args_list] == sizes


@pytest.mark.parametrize("window, tokens", [(512, 16_384), (32_768, 32_768)])
def test_a_whole_window_always_fits_by_default(parts, window, tokens):
    with patch.object(parts[0].config.text_config, "max_position_embeddings", window):
        assert Worker(*parts, 16, None, 64, Metrics()).max_batch_tokens == tokens


def raw(url: str, content: bytes) -> socket.socket:
    connection = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=20)
    connection.sendall(content)
    return connection


def closed(connection: socket.socket) -> bool:
    """Waits for the server to close it."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionError:
        pass
    return True


HALF_A_HEADER = b"GET /health HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize("content", [b"", HALF_A_HEADER, HALF_A_HEADER + b"\r\n" + HALF_A_HEADER])
def test_a_header_that_never_arrives_whole(parts, content):
    with patch.object(connections, "HEADER_TIMEOUT", 0.2), listening(parts) as url:
        with raw(url, content) as connection:
            assert closed(connection)
        assert httpx.get(f"{url}/health").status_code == 200


def test_idle_connections_lock_nobody_out(parts):
    with patch.object(connections, "MAX_CONNECTIONS", 8), listening(parts) as url:
        idle = [raw(url, HALF_A_HEADER) for _ in range(30)]
        for _ in range(3):
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        assert all(closed(each) for each in idle[:20])  # the oldest
        for each in idle:
            each.close()


def test_connections_with_a_whole_request_stay(parts):
    with patch.object(connections, "MAX_CONNECTIONS", 4), listening(parts) as url, ThreadPoolExecutor(1) as pool:
        with held(parts[0]) as (go, steps):
            asked = pool.submit(httpx.post, url + CHAT, json=body(), timeout=30)
            wait_until(lambda: steps)
            idle = [raw(url, HALF_A_HEADER) for _ in range(20)]
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
            go.set()
            assert asked.result().status_code == 200
        for each in idle:
            each.close()


def test_a_client_has_a_limit_of_connections(parts):
    with patch.object(connections, "MAX_CLIENT_CONNECTIONS", 4), listening(parts) as url:
        idle = [raw(url, HALF_A_HEADER) for _ in range(12)]
        assert all(closed(each) for each in idle[:8])  # the oldest
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        for each in idle:
            each.close()


def test_clients_that_never_read_are_closed(parts):
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 100
    unsent = bytearray()

    def is_closed(connection: socket.socket) -> bool:
        """Sends as much as the server takes; whether the server has closed the connection."""
        unsent.extend(ask if not unsent else b"")
        try:
            del unsent[: connection.send(unsent)]
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        return False

    with patch.object(connections, "SEND_TIMEOUT", 0.2), listening(parts) as url:
        with raw(url, b"") as connection:
            connection.setblocking(False)
            wait_until(lambda: is_closed(connection))
        answered = read_metrics(httpx.get(f"{url}/metrics").text)['vikdf_requests_total{status="200"}']
        assert answered < 3000  # what fits into the system's buffers, not all that was asked for
        with patch.object(connections, "SEND_TIMEOUT", 100), raw(url, ask) as connection:  # and here it is all read
            found = b""
            while found.count(b"HTTP/1.1 200 OK") < 100:
                found += connection.recv(2**20)


def test_a_deadline_ends_a_job_of_which_nobody_reads():
    async def run() -> bool:
        job = Job(None, None, 1, (), asyncio.get_running_loop().time() + 0.01, asyncio.get_running_loop())
        never, cancelled = asyncio.Event(), []
        request, model = SimpleNamespace(receive=never.wait), SimpleNamespace(cancel=cancelled.append)
        await app.cancel_when_client_leaves(request, job, model)
        return cancelled == [job] and job.events.empty()

    assert asyncio.run(run())


def from_client(number: int) -> dict[str, str]:
    return {"X-Forwarded-For": f"10.0.0.{number}"}  # of which the server believes a proxy on this machine


def test_a_client_has_a_share_of_the_requests(parts):
    with listening(parts, max_client_requests=2) as url, httpx.Client(base_url=url, timeout=30) as client:
        with held(parts[0]) as (go, steps), ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.post, CHAT, json=body(), headers=from_client(1)) for _ in range(2)]
            wait_until(lambda: steps and requests_in(client) == 2)
            for path in (CHAT, "/v1/knowledge"):
                response = client.post(path, json=body(), headers=from_client(1))
                refused(response, 429, "Your address")
                assert int(response.headers["retry-after"]) >= 1
            for path in ("/health", "/metrics"):
                assert client.get(path, headers=from_client(1)).status_code == 200
            asked.append(pool.submit(client.post, CHAT, json=body(), headers=from_client(2)))
            wait_until(lambda: requests_in(client) == 3)
            go.set()
            assert all(each.result().status_code == 200 for each in asked)
        wait_until(lambda: client.post(CHAT, json=body(), headers=from_client(1)).status_code == 200)


def test_open_bodies_have_a_budget(parts):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 900000\r\n"
    large = json.dumps(body([{"role": "user", "content": "a" * 300_000}]))
    budgets = []

    class WatchedBudget(limits.Budget):
        def __init__(self, *args):
            super().__init__(*args)
            budgets.append(self)

    watched = patch.object(app, "Budget", WatchedBudget)
    with patch.object(app, "MAX_OPEN_BYTES", 1_000_000), watched, listening(parts) as url:
        with httpx.Client(base_url=url, headers={"Content-Type": "application/json"}) as client:
            ask = partial(client.post, CHAT, content=large)

            def stalled(number: int) -> socket.socket:
                forwarded = f"X-Forwarded-For: 10.0.0.{number}\r\n\r\n"
                connection = raw(url, f"{head}{forwarded}".encode() + b" " * (400_000 + limits.SMALL_BODY))
                wait_until(lambda: any(budget.taken[f"10.0.0.{number}"] >= 400_000 for budget in budgets))
                return connection

            with stalled(1):
                refused(ask(headers=from_client(1)), 503, "large requests")
                assert client.post(CHAT, json=body(), headers=from_client(1)).status_code == 200
                refused(ask(headers=from_client(2)), 413, "300000 characters")  # it was read
                with stalled(2):
                    refused(ask(headers=from_client(3)), 503, "large requests")
                    assert client.post(CHAT, json=body(), headers=from_client(3)).status_code == 200
            wait_until(lambda: ask(headers=from_client(1)).status_code == 413)


@pytest.mark.parametrize(
    "client, network",
    [
        (None, None),
        (("127.0.0.1", 80), "127.0.0.1"),
        (("testclient", 80), "testclient"),
        (("a:b", 80), "a:b"),
        (("2001:db8:1:2:3:4:5:6", 80), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::", 80), "2001:db8:1:2::/64"),
        (("::ffff:10.0.0.1", 80), "10.0.0.1"),
        (("fe80::1%eth0", 80), "fe80::/64"),
    ],
)
def test_what_is_one_client(client, network):
    assert limits.client_network(client) == network


def test_a_budget_forgets_who_has_nothing():
    budget = limits.Budget(10, 6)
    assert [budget.take(*each) for each in (("a", 6), ("a", 1), ("b", 5), ("b", 4), ("c", 1), ("c", 0))] == [
        *(True, False, False, True, False, True)
    ]
    for client, amount in (("a", 6), ("b", 4), ("c", 0), ("d", 0)):
        budget.give_back(client, amount)
    assert not budget.taken and budget.take("c", 6)


def bombs() -> dict[str, dict]:
    """Bodies whose size says little of what they cost to check."""
    field = {f"x{number}": 1 for number in range(1000)}
    return {
        "fields": field,
        "fields of a message": {"messages": [{**QUESTION[0], **field}] * 100},
        "parts": {"messages": [{"role": "user", "content": [{}] * 10_000}]},
        "messages": {"messages": [{}] * 1000},
        "parts of messages": {"messages": [{"role": "user", "content": [{}] * 10}] * 1000},
    }


@pytest.mark.parametrize("kind", bombs())
def test_the_check_of_a_body_ends_early(client, kind):
    with pytest.raises(ValidationError) as refusal:
        schema.ChatCompletionRequest.model_validate(body() | bombs()[kind])
    assert refusal.value.error_count() < 100
    refused(client.post(CHAT, json=body() | bombs()[kind]), 400, "")


@pytest.mark.parametrize("many", ["[" + "[]," * 250_000 + "1]", '{"a":1' + ',"a":1' * 250_000 + "}"])
def test_objects_are_counted_before_they_are_read(client, many):
    content = json.dumps(body())[:-1] + f', "metadata": {many}}}'
    with patch.object(json, "loads", side_effect=AssertionError("read")):
        response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    refused(response, 413, "250000 of")


def test_large_texts_are_prepared_one_at_a_time_and_no_other_waits_for_them(parts):
    begun, go, texts = threading.Event(), threading.Event(), []

    def wait(processor, chats, **how):
        texts.append(len(chats[0][0]["content"]))
        if texts[-1] > schema.LARGE_TEXT:
            begun.set()
            assert go.wait(20)
        return original(processor, chats, **how)

    original, large = type(parts[1]).__call__, [{"role": "user", "content": "a" * (schema.LARGE_TEXT + 1)}]
    with patch.object(type(parts[1]), "__call__", wait), serving(parts) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, CHAT, json=body(large)) for _ in range(8)]
        assert begun.wait(20)
        assert answer(client)
        assert sorted(texts)[1:] == [schema.LARGE_TEXT + 1]
        go.set()
        assert all(each.result().status_code in (200, 400) for each in asked)


def test_two_lengths_are_refused(parts):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with listening(parts) as url, raw(url, head.encode()) as connection:
        found = connection.recv(10_000)
        assert found.startswith(b"HTTP/1.1 400") and b"connection: close" in found.lower()
        assert closed(connection)


def test_health_looks_at_the_worker(parts):
    with serving(parts, timeout=0.2) as client, held(parts[0]) as (go, steps), ThreadPoolExecutor(1) as pool:
        pool.submit(client.post, CHAT, json=body())
        wait_until(lambda: client.get("/health").status_code == 503)
        assert "no progress" in client.get("/health").json()["status"]
        go.set()
        wait_until(lambda: client.get("/health").json() == {"status": "ok"})


HALF = "\ud83d"


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": HALF},
        {"stop": HALF},
        {"stop": ["a", HALF]},
        {"user": HALF},
        {HALF: 1},
        {"stream_options": {HALF: 1}},
        {"messages": [{"role": HALF, "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": HALF}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a " + HALF}]}]},
        {"messages": [{"role": "user", "content": "a", "name": HALF}]},
        {"messages": with_picture(HALF)},
        {"messages": with_picture("data:image/png;base64," + HALF)},
        {"messages": with_picture(f"data:image/{HALF};base64,AAAA")},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/knowledge"])
def test_half_an_emoji_breaks_nothing(client, path, wrong):
    content = json.dumps({**body(), **wrong})
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text


@pytest.mark.parametrize("sampling", [{"temperature": 1e-38}, {"temperature": 1e-300}, {"temperature": 0.0009}])
def test_temperatures_that_no_logits_survive_are_refused(client, sampling):
    refused(client.post(CHAT, json=body(**sampling)), 400, "temperature: .*0.001")


@pytest.mark.parametrize("sampling", [{"temperature": 0.001}, {"top_p": 1e-38}, {"temperature": 2, "top_p": 1e-300}])
def test_extreme_samplings_work(client, sampling):
    assert answer(client, **sampling)


@pytest.mark.parametrize("depth", [100, 500, 900, 990, 2000, 100_000])
@pytest.mark.parametrize("field", ["metadata", "messages", "model", "stop", "user"])
def test_deep_json_is_refused(client, caplog, depth, field):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        inner = opening * depth + ("1" if ":" in opening else "") + closing * depth
        content = json.dumps(body() | {field: 0}).replace(f'"{field}": 0', f'"{field}": {inner}')
        refused(client.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400, "")
    assert "Traceback" not in caplog.text and "_error\n" not in caplog.text


LONG = [{"role": "user", "content": "the water was so blue! " * 40}]  # many times as long as a question


@contextmanager
def watched_passes(model):
    """Rows and columns of each pass of the LLM; each pass waits until the test lets one more go."""
    passes, go = [], threading.Semaphore(0)

    def wait(_, args, given):
        assert go.acquire(timeout=60)
        passes.append(tuple(given["inputs_embeds"].shape[:2]))

    handle = model.language_model.base_model.register_forward_pre_hook(wait, with_kwargs=True)
    try:
        yield passes, go
    finally:
        go.release(100_000)
        handle.remove()


def requests_in(client) -> int:
    """Requests that the worker has, waiting or running."""
    figures = metrics(client)
    return figures["vikdf_queue_length"] + figures["vikdf_running_requests"]


def let_pass(passes: list, go: threading.Semaphore, *futures) -> None:
    """Lets the LLM make one pass after the other until these are done."""
    while not all(future.done() for future in futures):
        before = len(passes)
        go.release()
        wait_until(lambda before=before: len(passes) > before or all(future.done() for future in futures))


@pytest.fixture
def small_pieces(parts):
    with patch.dict(worker.PIECE_TOKENS, {"cpu": 32}), patch.object(worker, "UNDISTURBED", 0):
        yield


def test_a_long_prompt_is_read_in_pieces_to_the_same_reply(parts, pipe, small_pieces):
    expected = pipe(LONG, max_new_tokens=8)[0]["generated_text"]
    sampled = {"temperature": 1.0, "seed": 3, "num_candidates": 4, "max_tokens": 6}
    with serving(parts) as client:
        with patch.dict(worker.PIECE_TOKENS, {"cpu": 100_000}):
            others = [text_of(answer(client, LONG, **how)) for how in ({"num_beams": 3}, sampled)]
        with watched_passes(parts[0]) as (passes, go):
            go.release(100_000)
            found = answer(client, LONG)
        assert text_of(found) == expected
        length = found["usage"]["prompt_tokens"] - 1
        assert passes[: -(-length // 32)] == [(1, 32)] * (length // 32) + [(1, length % 32)] * (length % 32 > 0)
        assert set(passes[-(-length // 32) :]) == {(1, 1)}
        assert [text_of(answer(client, LONG, **how)) for how in ({"num_beams": 3}, sampled)] == others


def test_a_client_that_leaves_ends_the_reading_of_its_prompt(parts, small_pieces):
    with listening(parts) as url, watched_passes(parts[0]) as (passes, go), httpx.Client(base_url=url) as client:
        for number, more in enumerate(({}, {"num_beams": 3}), 1):
            with raw(url, b"") as leaver:
                content = json.dumps(body(LONG, **more)).encode()
                head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
                leaver.sendall(f"{head}{len(content)}\r\n\r\n".encode() + content)
                passes.clear()
                go.release()
                wait_until(lambda: passes)
            left = f'vikdf_requests_total{{status="499"}} {number}.0'
            wait_until(lambda left=left: left in client.get("/metrics").text)
            go.release()  # the pass that was about to begin
            wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)
            assert len(passes) <= 3  # of a dozen, one of them let go for the first client


def test_a_deadline_ends_the_reading_of_a_prompt(parts, small_pieces):
    with serving(parts, timeout=1.0) as client, watched_passes(parts[0]) as (passes, go):
        go.release()
        refused(client.post(CHAT, json=body(LONG)), 504, "before the deadline")
        go.release()
        wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)
        assert len(passes) <= 2


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"temperature": 1.0, "seed": 3, "num_candidates": 2}])
def test_short_requests_go_between_the_pieces_of_a_long_one(parts, small_pieces, more):
    seeded = {"temperature": 1.0, "seed": 7}
    short = [{}, {"num_beams": 2}, {"temperature": 1.3}, seeded]
    with serving(parts) as client, ThreadPoolExecutor(6) as pool:
        alone = [text_of(answer(client, max_tokens=2, **how)) for how in short]
        expected = text_of(answer(client, LONG, **more))
        with watched_passes(parts[0]) as (passes, go):
            long = pool.submit(answer, client, LONG, **more)
            go.release()
            wait_until(lambda: passes)
            asked = [pool.submit(answer, client, max_tokens=2, **how) for how in short]
            wait_until(lambda: requests_in(client) == 5)
            let_pass(passes, go, *asked)
            assert not long.done()
            go.release(100_000)
            found = [text_of(each.result()) for each in asked]
            assert text_of(long.result()) == expected
        assert found[:2] + found[3:] == alone[:2] + alone[3:]
        pages = metrics(client)
    assert pages["vikdf_batch_size_count"] == 10 and pages["vikdf_completion_tokens_total"] > 0


def test_what_goes_between_draws_numbers_of_its_own(parts, small_pieces):
    with serving(parts) as client, ThreadPoolExecutor(4) as pool, watched_passes(parts[0]) as (passes, go):
        long = pool.submit(answer, client, LONG, temperature=1.0, seed=3, max_tokens=40)
        go.release()
        wait_until(lambda: passes)
        found = set()
        for _ in range(4):
            asked = pool.submit(answer, client, temperature=2.0, max_tokens=4)
            wait_until(lambda: requests_in(client) == 2)
            let_pass(passes, go, asked)
            found.add(text_of(asked.result()))
        assert len(found) > 1 and not long.done()
        go.release(100_000)


def test_what_was_interrupted_then_runs_for_as_long(parts, small_pieces):
    with serving(parts) as client, ThreadPoolExecutor(4) as pool, watched_passes(parts[0]) as (passes, go):
        with patch.object(worker, "UNDISTURBED", 1e9):
            long = pool.submit(answer, client, LONG)
            go.release()
            wait_until(lambda: passes)
            short = [pool.submit(answer, client, max_tokens=2, num_beams=number) for number in (1, 2)]
            wait_until(lambda: requests_in(client) == 3)
            let_pass(passes, go, long)
            assert sum(each.done() for each in short) == 1
            let_pass(passes, go, *short)


def test_a_short_request_that_fails_fails_alone(parts, small_pieces):
    with serving(parts) as client, ThreadPoolExecutor(4) as pool, watched_passes(parts[0]) as (passes, go):
        long = pool.submit(answer, client, LONG)
        go.release()
        wait_until(lambda: passes)
        with patch.object(type(parts[0]), "encode_context", side_effect=RuntimeError("out of memory")):
            asked = pool.submit(client.post, CHAT, json=body(max_tokens=2))
            wait_until(lambda: requests_in(client) == 2)
            let_pass(passes, go, asked)
            refused(asked.result(), 500, "failed")
        go.release(100_000)
        assert text_of(long.result())


# ---- what clients send, and where the application is mounted ----


@pytest.mark.parametrize(
    "neutral",
    [
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"logit_bias": {}},
        {"store": False},
        {"metadata": {}},
        {"service_tier": "auto"},
        {"service_tier": "default"},
        {"modalities": ["text"]},
        {"top_logprobs": 0},
        {"stream_options": {"include_obfuscation": False}},
        {"messages": [{**QUESTION[0], "name": "Ada", "tool_calls": [], "annotations": []}]},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(client, neutral):
    assert text_of(answer(client, **{"messages": QUESTION, **neutral})) == text_of(answer(client))


@pytest.mark.parametrize(
    "asking",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text", "schema": {}}},
        {"tools": [{"type": "function", "function": {"name": "a"}}]},
        {"tool_choice": "required"},
        {"logit_bias": {"1": 5}},
        {"store": True},
        {"store": 0},
        {"metadata": {"a": "b"}},
        {"service_tier": "priority"},
        {"modalities": ["text", "audio"]},
        {"modalities": []},
        {"stream_options": {"include_obfuscation": True}},
        {"messages": [{**QUESTION[0], "tool_calls": [{"id": "a"}]}]},
    ],
)
def test_fields_that_ask_for_something_are_refused(client, asking):
    refused(client.post(CHAT, json={**body(), **asking}), 400, "not supported by this server")


def test_one_model(parts):
    with serving(parts, name="org/mine") as client:
        for model in ("org/mine", "org%2Fmine"):
            found = client.get(f"/v1/models/{model}").json()
            assert found == client.get("/v1/models").json()["data"][0] and found["id"] == "org/mine"
        refused(client.get("/v1/models/gpt-4"), 404, "serves 'org/mine'")


def test_mounted_in_another_application(parts):
    outer = FastAPI()
    outer.mount("/llm", create_app(*parts, api_key=SECRET))
    client = TestClient(outer)
    assert client.get("/llm/health").json() == {"status": "ok"}  # whose worker starts with the first request
    for path in ("chat/completions", "knowledge"):
        refused(client.post(f"/llm/v1/{path}", json=body()), 401, "API key")
    client.headers.update({"Authorization": f"Bearer {SECRET}"})
    with serving(parts) as alone:
        assert text_of(client.post("/llm" + CHAT, json=body()).json()) == text_of(answer(alone))
    assert client.post("/llm/v1/knowledge", json=body()).status_code == 200


# ---- the official client, the command ----


def test_the_openai_client(parts, pipe):
    openai = pytest.importorskip("openai")
    with listening(parts, api_key=SECRET) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0)
        assert [model.id for model in client.models.list()] == ["vikdf"]
        ask = client.chat.completions.create
        expected = pipe(LONGER, max_new_tokens=20)[0]["generated_text"]
        reply = ask(model="vikdf", messages=LONGER, max_tokens=20)
        assert reply.choices[0].message.content == expected and reply.usage.completion_tokens == 20
        with ask(model="vikdf", messages=LONGER, max_tokens=20, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
        further = [*LONGER, reply.choices[0].message, {"role": "user", "content": "Why?"}]
        assert ask(model="vikdf", messages=further, temperature=0, extra_body={"use_knowledge": False}).choices
        with pytest.raises(openai.BadRequestError, match="tools: not supported"):
            ask(model="vikdf", messages=QUESTION, tools=[{"type": "function", "function": {"name": "a"}}])
        with pytest.raises(openai.NotFoundError):
            ask(model="gpt-4", messages=QUESTION)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_the_command(parts, tmp_path, monkeypatch, capsys):
    for part in parts:
        part.save_pretrained(tmp_path / "mine")
    monkeypatch.setenv("VIKDF_API_KEY", SECRET)
    with patch.object(uvicorn, "run") as run:
        main(["serve", "--model", str(tmp_path / "mine"), "--port", "8123", "--max-batch", "2", "--timeout", "5"])
    (app,), settings = run.call_args
    assert (settings["host"], settings["port"], settings["access_log"]) == ("127.0.0.1", 8123, False)
    with TestClient(app) as client:
        refused(client.get("/v1/models"), 401, "API key")
        client.headers.update({"Authorization": f"Bearer {SECRET}"})
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        assert client.post(CHAT, json={**body(), "model": "mine"}).status_code == 200
    assert settings["http"] is connections.GuardedProtocol
    with pytest.raises(SystemExit, match="vikdf: .*positive"):
        main(["serve", "--model", str(tmp_path / "mine"), "--max-batch", "0"])
    with pytest.raises(SystemExit, match="vikdf: max_batch_tokens must be positive"):
        main(["serve", "--model", str(tmp_path / "mine"), "--max-batch-tokens", "0"])
    for port in ("99999", "-1"):
        with pytest.raises(SystemExit, match="vikdf: --port must be between 0 .*65535"):
            main(["serve", "--model", str(tmp_path / "mine"), "--port", port])


# ---- prompts for a language model elsewhere ----


@pytest.mark.parametrize("messages", CHATS)
def test_prompt_embeddings_make_the_llm_reply_as_ours_does(parts, messages):
    model, processor = parts
    embeddings = prompt_embeddings(model, processor, messages)
    inputs = processor([messages])
    assert embeddings.shape == (inputs["input_ids"].shape[1], model.config.text_config.hidden_size)
    settings = {"max_new_tokens": 16, "suppress_tokens": [2, processor.knowledge_token_id]}
    expected = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    llm = AutoModelForCausalLM.from_pretrained(
        model.config.backbones["language_model"]["repo_id"], dtype=torch.float32
    )
    greedy = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, "temperature": None, "top_p": None}
    assert torch.equal(llm.generate(inputs_embeds=embeddings[None], **greedy, **settings), expected)
    silent = llm.generate(inputs_embeds=llm.get_input_embeddings()(inputs["input_ids"]), **greedy, **settings)
    assert not torch.equal(silent, expected)


def test_prompt_embeddings_with_a_picture(parts):
    model, processor = parts
    red, blue = (
        prompt_embeddings(
            model,
            processor,
            [{"role": "user", "content": [{"type": "image", "image": picture(colour)}, *text_part("Look!")]}],
        )
        for colour in ("red", "blue")
    )
    assert red.shape == blue.shape and not torch.equal(red, blue)


def test_prompt_embeddings_are_importable_from_where_they_were():
    assert modeling_vikdf.server.prompt_embeddings is modeling_vikdf.server.app.prompt_embeddings is prompt_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompt_embeddings_come_back(dtype):
    rows = torch.randn(9, 5).to(dtype)
    payload = encode_prompt_embeddings(rows[2:4])
    assert torch.equal(torch.load(io.BytesIO(base64.b64decode(payload)), weights_only=True), rows[2:4])
    assert len(payload) < len(encode_prompt_embeddings(torch.randn(1000, 5)))
