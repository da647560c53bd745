"""`vikdf serve --engine-url`: replies of a language model that runs in vLLM, for which a small server stands in here.

It takes what vLLM's completions API takes, and nothing else, and streams as vLLM does; test_vllm.py has the real one.
"""

import asyncio
import base64
import io
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from conftest import load_script
from transformers import AutoModelForCausalLM, GenerationConfig


pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx  # noqa: E402
import test_server  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402
from test_server import (  # noqa: E402
    BEGUN,
    CHAT,
    CHATS,
    LONGER,
    QUESTION,
    SECRET,
    answer,
    body,
    data_url,
    events,
    listening,
    metrics,
    picture,
    refused,
    running,
    serving,
    streamed,
    text_of,
    wait_until,
    with_picture,
)

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor  # noqa: E402
from modeling_vikdf.building import unload_language_model  # noqa: E402
from modeling_vikdf.cli import main  # noqa: E402
from modeling_vikdf.pipeline_vikdf import prompt_embeddings  # noqa: E402
from modeling_vikdf.server import connect, create_app  # noqa: E402


parts, pipe = test_server.parts, test_server.pipe  # fixtures
# what a reply may break off with
FAULTS = {
    "end": "",
    "done": "data: [DONE]\n\n",
    "error": 'data: {"error": {"message": "the engine died", "code": 500}}\n\n',
    "noise": "data: {nothing\n\n",
    "no ids": 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n',
}


class Completion(BaseModel):
    """The fields of vLLM's `CompletionRequest` that we use, and their types."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    prompt_embeds: str
    max_tokens: int
    return_token_ids: bool
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False

    def prompt(self) -> torch.Tensor:
        return torch.load(io.BytesIO(base64.b64decode(self.prompt_embeds, validate=True)), weights_only=True)


class StandIn:
    """A server like vLLM's of a small language model, whose faults can be chosen. It remembers what it was asked."""

    def __init__(self, language_model, window: int = 512):
        self.language_model = language_model
        self.listing = {"object": "list", "data": [{"id": "small", "object": "model", "max_model_len": window}]}
        self.asked: list[Completion] = []
        self.fault, self.begun, self.left = None, 0, 0  # streams that were begun, and left by the client
        self.go = threading.Event()
        self.go.set()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.completions)

    async def models(self):
        return JSONResponse(self.listing)

    async def completions(self, completion: Completion, request: Request):
        self.asked.append(completion)
        prompt = completion.prompt()
        if self.fault == "refusal" or prompt.shape[1] != self.language_model.config.hidden_size:
            message = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)
        tokens = await asyncio.to_thread(self.generate, completion, prompt)
        if completion.stream:
            return StreamingResponse(self.stream(tokens, request), media_type="text/event-stream")
        return {"choices": [{"text": "", "token_ids": None if self.fault == "old" else tokens}]}

    def generate(self, request: Completion, prompt: torch.Tensor) -> list[int]:
        sampled = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        rows = self.language_model.generate(
            inputs_embeds=prompt[None].float(),
            max_new_tokens=request.max_tokens,
            do_sample=bool(request.temperature),
            suppress_tokens=[int(token) for token, bias in request.logit_bias.items() if bias == -100] or None,
            eos_token_id=request.stop_token_ids or None,
            pad_token_id=0,
            **(sampled if request.temperature else dict.fromkeys(sampled)),
        )
        return rows[0].tolist()

    async def stream(self, tokens: list[int], request: Request):
        self.begun, left = self.begun + 1, True
        try:
            pieces = [tokens[at : at + 2] for at in range(0, len(tokens), 2)]  # two where the client is slow
            for number, piece in enumerate(pieces):
                while number > 1 and not self.go.is_set():  # some words come at once
                    if await request.is_disconnected():
                        return
                    await asyncio.sleep(0.005)
                if number and self.fault in FAULTS:
                    yield FAULTS[self.fault]
                    break
                reason = "stop" if number == len(pieces) - 1 else None
                choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": piece}
                yield f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n"
            else:
                yield "data: [DONE]\n\n"
            left = False
        finally:
            self.left += left

    @contextmanager
    def held(self):
        self.go.clear()
        try:
            yield
        finally:
            self.go.set()

    def listening(self):
        return running(self.app)


@pytest.fixture(scope="module")
def language_model(parts):
    name = parts[0].config.backbones["language_model"]["repo_id"]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.fixture
def stand_in(language_model):
    return StandIn(language_model)


@pytest.fixture
def url(stand_in):
    with stand_in.listening() as url:
        yield url


@pytest.fixture
def engine(parts, url, stand_in):
    engine = connect(url, parts[0])
    stand_in.asked.clear()
    return engine


@pytest.fixture
def client(parts, engine):
    with serving(parts, engine=engine) as client:
        yield client


# ---- the answers ----


@pytest.mark.parametrize("messages", CHATS)
def test_the_answer_is_that_of_the_model_here(parts, client, messages):
    settings = {"max_tokens": 12, "temperature": 0}
    with serving(parts) as alone:
        expected, usage = answer(alone, messages, **settings), {"stream_options": {"include_usage": True}}
        *_, last = events(alone.post(CHAT, json=body(messages, stream=True, **settings, **usage)))
    found = answer(client, messages, **settings)
    assert found["choices"] == expected["choices"] and found["usage"] == expected["usage"] == last["usage"]
    assert streamed(client, messages, **settings)[:2] == (text_of(expected), "length")


def test_many_at_once(parts, stand_in, client):
    chats = CHATS * 2
    with serving(parts) as alone:
        expected = [text_of(answer(alone, chat)) for chat in chats]
    with stand_in.held(), ThreadPoolExecutor(len(chats)) as pool:
        waiting = [pool.submit(answer, client, chat) for chat in chats]
        wait_until(lambda: metrics(client)["vikdf_running_requests"] == len(chats))
        stand_in.go.set()
        assert [text_of(each.result()) for each in waiting] == expected
    assert metrics(client)["vikdf_running_requests"] == 0
    assert metrics(client)["vikdf_completion_tokens_total"] == 8 * len(chats)


def test_the_end_of_a_turn_ends_the_reply(parts, engine):
    model, processor = parts
    whole = model.generate(**processor([QUESTION]))[0, -8:].tolist()
    config = GenerationConfig(**{**model.generation_config.to_diff_dict(), "eos_token_id": [2, whole[4]]})
    with patch.object(model, "generation_config", config), serving(parts, engine=engine) as client:
        found = answer(client)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == whole.index(whole[4]) + 1


def test_stop_texts_end_the_engines_reply(parts, client, stand_in):
    whole = text_of(answer(client, LONGER, max_tokens=300))
    stop = whole[len(whole) // 2 :][:3]
    found = answer(client, LONGER, max_tokens=300, stop=stop)
    assert (text_of(found), found["choices"][0]["finish_reason"]) == (whole[: whole.index(stop)].strip(), "stop")
    assert found["usage"]["completion_tokens"] < 300
    assert streamed(client, LONGER, max_tokens=300, stop=stop)[:2] == (text_of(found), "stop")


def test_replies_that_are_begun_pictures_and_no_knowledge(pipe, client):
    assert text_of(answer(client, BEGUN)) == pipe(BEGUN)[0]["generated_text"]
    silent = pipe(LONGER, use_knowledge=False)[0]["generated_text"]
    assert text_of(answer(client, LONGER, use_knowledge=False)) == silent
    look = [{"role": "user", "content": "Look!"}]
    seen = text_of(answer(client, with_picture(data_url(picture("red")))))
    assert seen == pipe(look, images=picture("red"))[0]["generated_text"]


def test_mounted_in_another_application(parts, engine):
    outer = FastAPI()
    outer.mount("/llm", create_app(*parts, engine=engine))
    with TestClient(outer) as client, serving(parts) as alone:
        assert text_of(client.post("/llm" + CHAT, json=body()).json()) == text_of(answer(alone))


def test_knowledge_is_computed_here(parts, client):
    with serving(parts) as alone:
        assert client.post("/v1/knowledge", json=body()).json() == alone.post("/v1/knowledge", json=body()).json()


# ---- what the engine is asked ----


def test_what_a_greedy_reply_asks(parts, client, stand_in):
    model, processor = parts
    answer(client, LONGER, max_tokens=5, temperature=0, seed=3)
    [asked] = stand_in.asked
    assert torch.equal(asked.prompt(), prompt_embeddings(model, processor, LONGER))
    assert (asked.temperature, asked.max_tokens, asked.seed) == (0, 5, None)
    assert asked.model == "small" and asked.stream and asked.return_token_ids and asked.ignore_eos
    assert asked.stop_token_ids == [2]
    never = {*model.generation_config.suppress_tokens, processor.knowledge_token_id}
    assert asked.logit_bias == {str(token): -100 for token in never if token < model.config.text_config.vocab_size}


@pytest.mark.parametrize(
    "given, config, expected",
    [
        ({"temperature": 0.7}, {}, (0.7, 1.0, 0, 0.0)),
        ({"top_p": 0.9, "seed": 5}, {}, (1.0, 0.9, 0, 0.0)),
        ({"temperature": 0.7}, {"min_p": 0.1, "top_k": 9}, (0.7, 1.0, 0, 0.1)),
        ({}, {"do_sample": True, "min_p": 0.1, "top_k": 0, "temperature": 1.5}, (1.5, 1.0, 0, 0.1)),
        ({}, {"do_sample": True}, (1.0, 1.0, 50, 0.0)),  # as `generate` fills in
        ({}, {"do_sample": True, "num_candidates": 4}, (1.0, 1.0, 50, 0.0)),
        ({"temperature": 0}, {"do_sample": True, "top_p": 0.5, "min_p": 0.1}, (0.0, 1.0, 0, 0.0)),
    ],
)
def test_sampling_is_that_of_the_model_here(parts, engine, stand_in, given, config, expected):
    """Everything is sent: vLLM would take what is missing from the language model's own configuration."""
    config = GenerationConfig(eos_token_id=2, pad_token_id=0, max_new_tokens=4, **config)
    with patch.object(parts[0], "generation_config", config), serving(parts, engine=engine) as client:
        assert answer(client, **given)["usage"]["completion_tokens"] <= 4
    [asked] = stand_in.asked
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == expected
    assert (asked.repetition_penalty, asked.seed) == (1.0, given.get("seed"))


def test_settings_that_the_engine_has_not_are_told(parts, engine, caplog):
    config = GenerationConfig(eos_token_id=2, max_new_tokens=4, no_repeat_ngram_size=3, num_beams=2)
    config.num_candidates = 4
    with patch.object(parts[0], "generation_config", config):
        create_app(*parts, engine=engine)
    assert "settings: no_repeat_ngram_size, num_beams, num_candidates" in caplog.text
    caplog.clear()
    create_app(*parts, engine=engine)
    assert not caplog.text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 2}, "num_beams: not supported by the engine"),
        ({"num_candidates": 4, "temperature": 1.0}, "num_candidates: not supported by the engine"),
        ({"temperature": 0.005}, "temperature: .*0.01"),
        ({"max_tokens": 512}, "max_tokens=512 leaves no room"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(client, stand_in, given, message):
    refused(client.post(CHAT, json=body(**given)), 400, message)
    assert not stand_in.asked
    assert answer(client, num_beams=1, num_candidates=1, n=1, logprobs=False, presence_penalty=0)


def test_the_engines_window_counts(parts, language_model):
    prompt = parts[1]([QUESTION])["input_ids"].shape[1]
    stand_in = StandIn(language_model, window=prompt + 8)
    long = [*LONGER[1:3], *QUESTION]
    with stand_in.listening() as url, serving(parts, engine=connect(url, parts[0])) as client:
        assert answer(client, long)["usage"]["prompt_tokens"] == prompt  # without its oldest turns
        refused(client.post(CHAT, json=body(max_tokens=prompt + 8)), 400, "leaves no room")


# ---- what goes wrong ----


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_breaks_off(client, stand_in, caplog, fault):
    expected, stand_in.fault = text_of(answer(client)), fault
    refused(client.post(CHAT, json=body()), 502, "engine .* failed")
    *_, last = events(client.post(CHAT, json=body(stream=True)))
    assert "failed" in last["error"]["message"]
    stand_in.fault = None
    assert text_of(answer(client)) == expected
    assert metrics(client)["vikdf_running_requests"] == 0


@pytest.mark.parametrize("name", ["user", "safety_identifier", "prompt_cache_key"])
def test_what_changes_nothing_is_accepted(client, name):
    assert text_of(answer(client, **{name: "somebody"})) == text_of(answer(client))


def test_an_engine_that_refuses(client, stand_in, caplog):
    stand_in.fault = "refusal"
    for stream in (False, True):
        refused(client.post(CHAT, json=body(stream=stream)), 502, "engine .* failed")
    assert "400" in caplog.text and "--enable-prompt-embeds" in caplog.text
    assert QUESTION[0]["content"] not in caplog.text


def test_an_engine_that_is_gone(parts, stand_in):
    with stand_in.listening() as url:
        engine = connect(url, parts[0])
    with serving(parts, engine=engine) as client:
        refused(client.post(CHAT, json=body()), 503, "does not answer; try again")
        assert client.get("/health").status_code == 200


def test_a_client_that_leaves_ends_the_engines_reply(parts, engine, stand_in):
    with listening(parts, engine=engine) as url, httpx.Client(base_url=url, timeout=30) as client, stand_in.held():
        with client.stream("POST", CHAT, json=body(stream=True)) as response:
            next(response.iter_text())
        wait_until(lambda: stand_in.left == 1)
        wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)


def test_a_deadline_ends_the_engines_reply(parts, engine, stand_in):
    with serving(parts, engine=engine, timeout=1) as client, stand_in.held():
        response = client.post(CHAT, json=body())
        if response.status_code == 200:  # and not 504, for want of any words
            assert response.json()["choices"][0]["finish_reason"] == "length"
            assert response.json()["usage"]["completion_tokens"] < 8
        wait_until(lambda: stand_in.left == stand_in.begun)


def test_what_the_engine_has_not_answered_is_in_the_queue(parts, engine, stand_in):
    with serving(parts, engine=engine, max_queue=2) as client, stand_in.held(), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(answer, client) for _ in range(2)]
        wait_until(lambda: len(stand_in.asked) == 2)
        refused(client.post(CHAT, json=body()), 429, "Too many")
        stand_in.go.set()
        assert all(each.result() for each in waiting)
        assert answer(client)


def test_shutting_down_ends_what_runs(parts, engine, stand_in):
    with stand_in.held(), ThreadPoolExecutor(1) as pool:
        with listening(parts, engine=engine) as url:
            future = pool.submit(httpx.post, url + CHAT, json=body(), timeout=30)
            wait_until(lambda: stand_in.begun)
        with pytest.raises(httpx.HTTPError):
            future.result().raise_for_status()


def test_logs_hold_no_text_and_no_key(parts, url, stand_in, caplog):
    caplog.set_level(logging.DEBUG)
    engine = connect(url, parts[0], SECRET)
    with serving(parts, engine=engine) as client:
        replies = [text_of(answer(client, LONGER))]
        stand_in.fault = "error"
        client.post(CHAT, json=body(LONGER))
    for text in (SECRET, LONGER[1]["content"], *replies):
        assert text and text not in caplog.text


# ---- connecting ----


def test_connecting(parts, url, stand_in):
    for address in (url, url + "/", url + "/v1", url + "/v1/"):
        engine = connect(address, parts[0], "key")
        assert (engine.url, engine.model, engine.window) == (url, "small", 512)
        assert engine.headers == {"Authorization": "Bearer key"}


def test_engines_that_will_not_do(parts, url, stand_in):
    model, _ = parts
    for fault, message in (("refusal", "400 .*vllm serve .* --enable-prompt-embeds"), ("old", "no token ids")):
        stand_in.fault = fault
        with pytest.raises(ValueError, match=message):
            connect(url, model)
    stand_in.fault = None
    with patch.object(model, "get_input_embeddings", lambda: torch.nn.Embedding(4, 7)):
        with pytest.raises(ValueError, match="refuses"):
            connect(url, model)
    with patch.object(stand_in.app.router, "routes", []), pytest.raises(ValueError, match="404 .*vllm serve"):
        connect(url, model)
    for nowhere in ("http://127.0.0.1:9", "127.0.0.1:8000", "ftp://127.0.0.1", "http://", ""):
        with pytest.raises(OSError, match="No engine answers at .*vllm serve"):
            connect(nowhere, model)


@pytest.mark.parametrize("listing", [{"data": []}, {"data": "small"}, {}, [], "hello", None])
def test_what_answers_is_no_openai_api(parts, url, stand_in, listing):
    stand_in.listing = listing
    with pytest.raises(ValueError, match="no OpenAI API"):
        connect(url, parts[0])


def test_servers_are_compared(parts, engine):
    compare = load_script("speed/compare_servers").compare
    with listening(parts) as one, listening(parts, engine=engine) as other:
        figures = asyncio.run(compare([one, other], clients=3, max_tokens=6, rounds=1))
    assert figures["equal_replies"] == 3 and figures["ratio"].keys() == {other}


def test_prompts_need_the_embeddings_alone(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    model = VikdfForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = VikdfProcessor.from_pretrained(tmp_path)
    before = prompt_embeddings(model, processor, LONGER)
    unload_language_model(model)
    assert torch.equal(prompt_embeddings(model, processor, LONGER), before) and model.device.type == "cpu"
    held = {name for name, value in model.language_model.named_parameters() if value.device.type != "meta"}
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in held] == ["embed_tokens"]


def test_the_command(parts, url, tmp_path, monkeypatch):
    for part in parts:
        part.save_pretrained(tmp_path / "mine")
    monkeypatch.setenv("VIKDF_ENGINE_API_KEY", SECRET)
    with serving(parts) as alone:
        expected = text_of(answer(alone, temperature=0))
    command = ["serve", "--model", str(tmp_path / "mine")]
    with patch.object(uvicorn, "run") as run, patch("modeling_vikdf.server.app.connect", wraps=connect) as connected:
        main([*command, "--engine-url", url])
        assert connected.call_args.args[2] == SECRET
    with TestClient(run.call_args.args[0]) as client:
        reply = client.post(CHAT, json={**body(temperature=0), "model": "mine"}).json()
    assert text_of(reply) == expected
    with pytest.raises(SystemExit, match="vikdf: No engine answers at http://127.0.0.1:9 .*vllm serve"):
        main([*command, "--engine-url", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit, match="vikdf: --engine-api-key is for the engine at --engine-url"):
        main([*command, "--engine-api-key", "a"])
