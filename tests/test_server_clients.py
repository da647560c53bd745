"""`vikdf serve` and the clients that exist: several replies, logprobs, pages of other origins, the official types."""

# ruff: noqa: F811 (fixtures that are imported)

import asyncio
import json
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from shutil import which
from unittest.mock import Mock, patch

import pytest
import torch


pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
uvicorn = pytest.importorskip("uvicorn")

from fastapi import HTTPException  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from test_server import (  # noqa: E402, F401
    CHAT,
    LONGER,
    QUESTION,
    SECRET,
    answer,
    body,
    client,
    data_url,
    events,
    held,
    listening,
    metrics,
    parts,
    picture,
    pipe,
    refused,
    serving,
    text_of,
    wait_until,
    with_picture,
)

import modeling_vikdf  # noqa: E402
from modeling_vikdf.cli import main  # noqa: E402
from modeling_vikdf.server import schema  # noqa: E402
from modeling_vikdf.server.app import create_app, stream_updates  # noqa: E402
from modeling_vikdf.server.jobs import Job, Update  # noqa: E402
from modeling_vikdf.server.logprobs import TokenLogprobs, TokenTexts  # noqa: E402
from modeling_vikdf.server.schema import Decoding  # noqa: E402


SAMPLED = {"temperature": 1.3, "max_tokens": 10}


def texts_of(answer: dict) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == [*range(len(answer["choices"]))]
    return [choice["message"]["content"] for choice in answer["choices"]]


def streamed_choices(client, messages=QUESTION, **settings) -> dict[int, dict]:
    """Text, logprobs and finish reason of each of the replies that are streamed."""
    found = {}
    for chunk in events(client.post(CHAT, json=body(messages, stream=True, **settings))):
        for choice in chunk["choices"]:
            parts = found.setdefault(choice["index"], {"text": "", "logprobs": [], "reason": None})
            assert parts["reason"] is None, "something came behind the end"
            parts["text"] += choice["delta"].get("content", "")
            parts["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            parts["reason"] = choice["finish_reason"]
    return found


# ---- several replies ----


@pytest.mark.parametrize("messages", [QUESTION, LONGER])
def test_several_replies(parts, client, pipe, messages):
    found = answer(client, messages, n=4, seed=3, **SAMPLED)
    wait_until(lambda: metrics(client)["vikdf_running_requests"] == 0)
    torch.manual_seed(3)
    inputs = pipe.processor([messages])
    drawn = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": 10, "num_return_sequences": 4}
    sequences = parts[0].generate(**inputs, **drawn)[:, inputs["input_ids"].shape[1] :]
    expected = [parts[1].tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in sequences]
    assert texts_of(found) == expected and len(set(expected)) > 1
    prompt = inputs["input_ids"].shape[1]
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 40, "total_tokens": prompt + 40}
    assert texts_of(answer(client, messages, n=4, seed=3, **SAMPLED)) == expected
    assert texts_of(answer(client, messages, n=4, seed=4, **SAMPLED)) != expected


def test_several_replies_are_streamed_each_with_its_index(client):
    whole = answer(client, LONGER, n=3, seed=5, **SAMPLED)
    found = streamed_choices(client, LONGER, n=3, seed=5, **SAMPLED)
    assert [found[index]["text"] for index in range(3)] == texts_of(whole)
    assert {each["reason"] for each in found.values()} == {"length"}
    *chunks, last = events(
        client.post(
            CHAT,
            json=body(LONGER, n=3, seed=5, stream=True, stream_options={"include_usage": True}, **SAMPLED),
        )
    )
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    indices = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
    assert indices != sorted(indices)  # they come side by side


def test_each_reply_ends_by_itself(parts, client):
    whole = texts_of(answer(client, n=6, seed=1, **SAMPLED))
    letters = sorted({letter for text in whole for letter in text if letter.isalpha()})
    stop = next(letter for letter in letters if any(letter not in text for text in whole))
    found = answer(client, n=6, seed=1, stop=stop, **SAMPLED)
    assert texts_of(found) == [text.partition(stop)[0].strip() for text in whole]
    reasons = [choice["finish_reason"] for choice in found["choices"]]
    assert reasons == ["stop" if stop in text else "length" for text in whole] and len(set(reasons)) == 2
    streams = streamed_choices(client, n=6, seed=1, stop=stop, **SAMPLED)
    assert [(streams[index]["text"], streams[index]["reason"]) for index in range(6)] == [
        *zip(texts_of(found), reasons, strict=True)
    ]


def test_a_prompt_is_read_once_for_all_of_its_replies(parts, client):
    spy = patch.object(type(parts[0]), "get_knowledge", autospec=True, side_effect=type(parts[0]).get_knowledge)
    with spy as knowledge:
        assert len(texts_of(answer(client, n=5, **SAMPLED))) == 5
    contexts = [call.args[1] for call in knowledge.call_args_list if call.args[1] is not None]
    assert [len(rows) for rows in contexts] == [1]


def test_several_replies_share_a_batch_up_to_its_size(parts):
    with serving(parts, max_batch=6) as client, ThreadPoolExecutor(6) as pool:
        spy = patch.object(type(parts[0]), "generate", autospec=True, side_effect=type(parts[0]).generate)
        with held(parts[0]) as (go, steps), spy as generate:
            waiting = [pool.submit(answer, client)]
            wait_until(lambda: steps)
            waiting += [pool.submit(answer, client, n=2, **SAMPLED) for _ in range(4)]
            wait_until(lambda: metrics(client)["vikdf_queue_length"] == 4)
            go.set()
            assert [len(texts_of(each.result())) for each in waiting] == [1, 2, 2, 2, 2]
        assert [len(call.kwargs["input_ids"]) for call in generate.call_args_list] == [1, 3, 1]
        refused(client.post(CHAT, json=body(n=7, **SAMPLED)), 400, "n=7.*at most 6")


def test_several_replies_count_against_the_tokens_of_a_batch(parts):
    with serving(parts) as client:
        tokens = 3 * answer(client, **SAMPLED)["usage"]["total_tokens"]
    with serving(parts, max_batch_tokens=tokens) as client:
        assert answer(client, n=3, **SAMPLED)
        refused(client.post(CHAT, json=body(n=4, **SAMPLED)), 400, f"tokens; at most {tokens}.*n,")


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"n": 0}, "n: .*greater than or equal to 1"),
        ({"n": 129}, "n: .*128"),
        ({"n": 2}, "n=2 needs a temperature above 0"),  # whose generation config is greedy
        ({"n": 2, "temperature": 0}, "n=2 needs a temperature above 0"),
        ({"n": 3, "num_beams": 2}, "n=3 .*2 beams or candidates"),
        ({"n": 5, "num_candidates": 4, "temperature": 1.0}, "n=5 .*4 beams or candidates"),
    ],
)
def test_replies_that_cannot_be_had(client, asked, message):
    refused(client.post(CHAT, json=body(**asked)), 400, message)


def test_the_best_beams(client, pipe):
    expected = [each["generated_text"] for each in pipe(QUESTION, num_beams=4, num_return_sequences=3)]
    assert texts_of(answer(client, n=3, num_beams=4)) == expected
    streams = streamed_choices(client, n=3, num_beams=4)
    assert [streams[index]["text"] for index in range(3)] == expected


def test_the_best_candidates_the_best_first(parts):
    how = {"seed": 3, "num_candidates": 6, **SAMPLED}
    with patch.object(parts[0].generation_config, "candidate_weights", {"likelihood": 1.0}, create=True):
        with serving(parts) as client:
            best = texts_of(answer(client, **how))
            three = texts_of(answer(client, n=3, **how))
            assert three[:1] == best and len(set(three)) == 3
            streams = streamed_choices(client, n=3, **how)
            assert [streams[index]["text"] for index in range(3)] == three
            assert len(set(texts_of(answer(client, n=6, **how)))) == 6


def test_more_replies_than_the_model_has_candidates_by_default(parts):
    config = parts[0].generation_config
    with patch.object(config, "num_candidates", 2, create=True), patch.object(config, "do_sample", True):
        with patch.object(config, "candidate_weights", {"likelihood": 1.0}, create=True), serving(parts) as client:
            assert len(texts_of(answer(client, n=4))) == 4
            assert len(texts_of(answer(client, n=1))) == 1


def test_several_replies_that_are_not_done_in_time_end_early():
    decoding = Decoding(True, 3, 1, 1, None, None, ())

    async def updates(*queued: Update) -> list[Update]:
        loop = asyncio.get_running_loop()
        job = Job(None, decoding, 9, (), loop.time() - 1, loop)  # whose deadline is over when nothing more is queued
        for update in queued:
            job.events.put_nowait(update)
        return [update async for update in stream_updates(job, Mock())]

    queued = [Update("a", None, 1, 0), Update("b", "stop", 2, 1), Update("c", None, 3, 0)]
    cut = [Update("", "length", 3, 0), Update("", "length", 0, 2)]
    assert asyncio.run(updates(*queued)) == queued + cut
    whole = [*queued, Update("", "stop", 4, 0), Update("d", "length", 9, 2)]
    assert asyncio.run(updates(*whole)) == whole
    with pytest.raises(HTTPException, match="504"):
        asyncio.run(updates())


# ---- logprobs ----


LOGPROBS = {"logprobs": True, "top_logprobs": 4}


def logprobs_of(answer: dict, index: int = 0) -> list[dict]:
    return answer["choices"][index]["logprobs"]["content"]


def spelt(entries: list[dict]) -> str:
    return bytes(sum((entry["bytes"] for entry in entries), [])).decode(errors="replace").strip()


def expected_logprobs(parts, messages, ids: list[int], **processing) -> torch.Tensor:
    """The LLM's log-probabilities [T, vocabulary] in front of each token of a reply."""
    model, processor = parts
    inputs = processor([messages])
    given = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(input_ids=given, attention_mask=torch.ones_like(given), **rest).logits
    logits = logits[0, -len(ids) - 1 : -1].float()  # [T, vocabulary]
    logits[:, model.generation_config.suppress_tokens] = -math.inf
    return logits.log_softmax(-1)


def reply_ids(parts, messages, **settings) -> list[int]:
    inputs = parts[1]([messages])
    return parts[0].generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("messages", [QUESTION, LONGER])
def test_logprobs_are_the_models(parts, client, messages):
    found = answer(client, messages, max_tokens=12, **LOGPROBS)
    assert text_of(found) == text_of(answer(client, messages, max_tokens=12))
    expected = expected_logprobs(parts, messages, ids := reply_ids(parts, messages, max_new_tokens=12))
    entries = logprobs_of(found)
    assert 6 < len(entries) <= 12  # white space at the end is not in the text
    for entry, id_, row in zip(entries, ids, expected, strict=False):
        assert math.isclose(entry["logprob"], row[id_], rel_tol=1e-4, abs_tol=1e-4)
        top = [each["logprob"] for each in entry["top_logprobs"]]
        torch.testing.assert_close(torch.tensor(top), row.topk(4).values, rtol=1e-4, atol=1e-4)
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # it is greedy
    assert spelt(entries) == text_of(found)


def test_logprobs_are_those_before_temperature_and_truncation(parts, client):
    how = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    plain, warm = (
        logprobs_of(answer(client, **how, **sampling))[0]["top_logprobs"]
        for sampling in ({}, {"temperature": 0.5, "top_p": 0.2, "seed": 1})
    )
    assert plain == warm and len(plain) == 20


def test_logprobs_in_a_stream_are_those_of_the_whole(client):
    whole = answer(client, LONGER, max_tokens=20, **LOGPROBS)
    found = streamed_choices(client, LONGER, max_tokens=20, **LOGPROBS)[0]
    assert (found["text"], found["logprobs"]) == (text_of(whole), logprobs_of(whole))


def test_each_piece_of_a_stream_has_its_own_logprobs(client):
    chunks = events(client.post(CHAT, json=body(LONGER, max_tokens=20, stream=True, **LOGPROBS)))
    for choice in (chunk["choices"][0] for chunk in chunks):
        if choice["delta"].get("content"):
            assert spelt(choice["logprobs"]["content"]) == choice["delta"]["content"].strip()
        else:
            assert choice["logprobs"] is None


def test_logprobs_of_several_replies_beside_others_without(parts):
    how = {"n": 2, "temperature": 1.0, "max_tokens": 8}
    with serving(parts) as client, ThreadPoolExecutor(4) as pool, held(parts[0]) as (go, steps):
        waiting = [pool.submit(answer, client)]
        wait_until(lambda: steps)
        more = ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2})
        waiting += [pool.submit(answer, client, **how, **each) for each in more]
        wait_until(lambda: metrics(client)["vikdf_queue_length"] == 3)
        go.set()
        _, without, bare, top = (each.result() for each in waiting)
        assert metrics(client)["vikdf_batch_size_sum"] == 4 and metrics(client)["vikdf_batch_size_count"] == 2
    assert [choice["logprobs"] for choice in without["choices"]] == [None, None]
    for found, number in ((bare, 0), (top, 2)):
        for choice in found["choices"]:
            entries = choice["logprobs"]["content"]
            assert {len(entry["top_logprobs"]) for entry in entries} == {number}
            assert spelt(entries) == choice["message"]["content"]


def test_logprobs_of_the_best_candidates(parts):
    how = {"num_candidates": 5, "n": 2, "seed": 2, "max_tokens": 10, "temperature": 1.2}
    with patch.object(parts[0].generation_config, "candidate_weights", {"likelihood": 1.0}, create=True):
        with serving(parts) as client:
            found = answer(client, LONGER, **how, **LOGPROBS)
            assert texts_of(found) == texts_of(answer(client, LONGER, **how))
        torch.manual_seed(2)
        drawn = {"do_sample": True, "temperature": 1.2, "top_k": 0, "max_new_tokens": 10}
        inputs = parts[1]([LONGER])
        sequences = parts[0].generate(**inputs, **drawn, num_candidates=5, num_return_sequences=2, processor=parts[1])[
            :, inputs["input_ids"].shape[1] :
        ]
    for index, ids in enumerate(sequences.tolist()):
        entries = logprobs_of(found, index)
        assert spelt(entries) == texts_of(found)[index]
        expected = expected_logprobs(parts, LONGER, ids)[range(len(ids)), ids][: len(entries)]
        found_ = torch.tensor([entry["logprob"] for entry in entries])
        torch.testing.assert_close(found_, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_logprobs_end_where_the_text_does(client, size):
    whole = text_of(answer(client, LONGER, max_tokens=30))
    # not within a broken character
    start = next(place for place in range(len(whole) // 2, len(whole)) if whole[place].isalpha())
    stop = whole[start : start + size]
    how = {"max_tokens": 30, "stop": stop, "logprobs": True}
    found = answer(client, LONGER, **how)
    assert spelt(logprobs_of(found)).startswith(text_of(found))
    assert not spelt(logprobs_of(found)[:-1]).startswith(text_of(found))
    assert streamed_choices(client, LONGER, **how)[0]["logprobs"] == logprobs_of(found)


def test_the_end_of_a_turn_has_no_logprob_of_its_own(parts):
    ids = reply_ids(parts, QUESTION)
    config = patch.object(parts[0].generation_config, "eos_token_id", [2, ids[4]])
    with config, serving(parts) as client:
        found = answer(client, logprobs=True)
        assert found["choices"][0]["finish_reason"] == "stop"
        assert len(logprobs_of(found)) == found["usage"]["completion_tokens"] - 1


def test_logprobs_of_a_character_in_several_tokens(parts):
    processor, text = parts[1], "a 😀b"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    told = []
    job = Job(None, None, len(ids), (), 0.0, None)
    job.emit = told.append
    for id_ in ids:
        job.append(id_, False, processor.tokenizer.decode, logprobs=TokenLogprobs(id_, -1.0, []))
    texts = TokenTexts(processor)
    found = [entry.id for update in told for entry in update.logprobs]
    assert found == ids
    assert bytes(sum((texts(id_)[1] for id_ in found), [])).decode().strip() == text
    assert any("\ufffd" in texts(id_)[0] for id_ in found)
    assert told[1].text == "😀" or len(told[-2].logprobs) > 1


def test_what_is_impossible_has_a_logprob_that_json_can_write(parts):
    possible = parts[1].tokenizer("dog water", add_special_tokens=False)["input_ids"]
    rest = sorted({*range(512)} - {*possible})
    with patch.object(parts[0].generation_config, "suppress_tokens", rest), serving(parts) as client:
        entries = logprobs_of(answer(client, max_tokens=2, logprobs=True, top_logprobs=20))
    assert min(each["logprob"] for each in entries[0]["top_logprobs"]) == -9999.0


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs: .*20"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs: .*0"),
        ({"top_logprobs": False}, "top_logprobs: "),
        ({"logprobs": 1}, "logprobs: "),
        ({"logprobs": True, "num_beams": 2}, "logprobs need num_beams=1"),
    ],
)
def test_logprobs_that_cannot_be_had(client, asked, message):
    refused(client.post(CHAT, json=body(**asked)), 400, message)


# ---- pages of other origins ----


ORIGIN = "https://chat.example.org"


def preflight(client, origin: str, path: str = CHAT, headers: str = "authorization,content-type,x-stainless-lang"):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return client.options(path, headers=asked)


def test_other_origins_are_refused_by_default(client):
    assert not [name for name in preflight(client, ORIGIN).headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in client.post(CHAT, json=body(), headers={"Origin": ORIGIN}).headers


@pytest.mark.parametrize("allowed", [[ORIGIN], ["http://localhost:3000", ORIGIN], ["*"]])
def test_origins_that_are_allowed(parts, allowed):
    with serving(parts, api_key=SECRET, allow_origins=allowed) as client:
        for path in (CHAT, "/v1/models", "/v1/knowledge"):
            found = preflight(client, ORIGIN, path)  # for which browsers send no key
            assert found.status_code == 200
            assert found.headers["access-control-allow-origin"] in (ORIGIN, "*")
            assert "x-stainless-lang" in found.headers["access-control-allow-headers"].lower()
            assert "POST" in found.headers["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in found.headers
        wrong = client.post(CHAT, json=body(), headers={"Origin": ORIGIN})
        refused(wrong, 401, "API key")
        assert wrong.headers["access-control-allow-origin"] in (ORIGIN, "*")  # the page may read why
        key = {"Origin": ORIGIN, "Authorization": f"Bearer {SECRET}"}
        for how in ({}, {"stream": True}):
            found = client.post(CHAT, json=body(**how), headers=key)
            assert found.status_code == 200 and found.headers["access-control-allow-origin"] in (ORIGIN, "*")


def test_origins_that_are_not_allowed(parts):
    with serving(parts, allow_origins=[ORIGIN]) as client:
        for other in ("https://example.org", "http://chat.example.org", ORIGIN + ".evil.org", "null"):
            found = preflight(client, other)
            assert found.status_code == 400 and "access-control-allow-origin" not in found.headers
            headers = client.post(CHAT, json=body(), headers={"Origin": other}).headers
            assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "wrong", ["example.org", "https://example.org/", "https://example.org/page", "https://Example.org", "", "null"]
)
def test_origins_that_no_browser_sends(parts, wrong):
    with pytest.raises(ValueError, match="origin.*https://example.org"):
        create_app(*parts, allow_origins=[wrong])


def test_the_command_allows_origins(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path / "mine")
    with patch.object(uvicorn, "run") as run:
        main(["serve", "--model", str(tmp_path / "mine"), "--allow-origin", "http://localhost:3000", ORIGIN])
    with TestClient(run.call_args.args[0]) as client:
        assert preflight(client, ORIGIN).headers["access-control-allow-origin"] == ORIGIN
    with pytest.raises(SystemExit, match="vikdf: .*origin"):
        main(["serve", "--model", str(tmp_path / "mine"), "--allow-origin", "localhost"])


# ---- the types of the official client ----


def strictly(kind: type, answer: dict) -> None:
    """That an answer is of an official type, with all of its fields and no others."""
    found = kind.model_validate(answer, strict=True)
    assert found.model_dump(exclude_unset=True, mode="json") == answer
    assert unofficial(found) == []


def unofficial(value) -> list[str]:
    """Names of fields that the official types lack."""
    if isinstance(value, list):
        return sum(map(unofficial, value), [])
    if not hasattr(value, "model_fields_set"):
        return []
    inner = [unofficial(getattr(value, name)) for name in value.model_fields_set]
    return [*(value.model_extra or ()), *sum(inner, [])]


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 1.0}, LOGPROBS, {"stop": "e"}, {"num_beams": 2}])
def test_answers_are_of_the_official_types(client, more):
    chat = pytest.importorskip("openai.types.chat")
    strictly(chat.ChatCompletion, answer(client, **more))
    for options in ({}, {"include_usage": True}):
        for chunk in events(client.post(CHAT, json=body(stream=True, stream_options=options, **more))):
            strictly(chat.ChatCompletionChunk, chunk)


def test_models_and_errors_are_of_the_official_types(client):
    openai = pytest.importorskip("openai")
    strictly(openai.types.Model, client.get("/v1/models/vikdf").json())
    found = client.get("/v1/models").json()
    strictly(pytest.importorskip("openai.pagination").SyncPage[openai.types.Model], found)
    strictly(openai.types.shared.ErrorObject, client.get("/v1/models/gpt-4").json()["error"])


# What a request may ask of OpenAI's API and not of this server, with something that it asks.
REFUSED = {
    "audio": {"format": "wav", "voice": "alloy"},
    "frequency_penalty": 1.0,
    "function_call": {"name": "a"},
    "functions": [{"name": "a"}],
    "logit_bias": {"50256": -100},
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "a"},
    "presence_penalty": 1.0,
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "service_tier": "priority",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "a"}}],
    "verbosity": "low",
    "web_search_options": {},
}
# How many tools may be called at once says nothing where there are none.
ANYTHING = {"parallel_tool_calls"}


def official_fields(module: str, name: str) -> set[str]:
    """The fields of one of the official client's types of requests."""
    kind = getattr(pytest.importorskip(module), name)
    return {*kind.__required_keys__, *kind.__optional_keys__}


def test_each_official_field_works_or_is_refused_by_name(client):
    module = "openai.types.chat.completion_create_params"
    fields = official_fields(module, "CompletionCreateParamsStreaming")
    assert fields == official_fields(module, "CompletionCreateParamsNonStreaming")
    ours = {*schema.ChatCompletionRequest.model_fields}
    assert fields - ours - ANYTHING <= REFUSED.keys(), "new ones: let them work, or refuse them by name"
    assert REFUSED.keys() <= fields
    for field, value in REFUSED.items():
        refused(client.post(CHAT, json=body(**{field: value})), 400, f"^{field}: ")


SAID = {"audio": {"id": "a"}, "refusal": "No", "function_call": {}, "tool_calls": [{}]}
CACHED = {"prompt_cache_breakpoint": {"mode": "explicit"}}


@pytest.mark.parametrize(
    "kind, ours, others",
    [
        *((f"{role}MessageParam", schema.ChatMessage, {}) for role in ("System", "Developer", "User")),
        ("AssistantMessageParam", schema.ChatMessage, SAID),
        ("ContentPartTextParam", schema.TextPart, CACHED),
        ("ContentPartImageParam", schema.ImagePart, CACHED),
        ("StreamOptionsParam", schema.StreamOptions, {"include_obfuscation": True}),
    ],
)
def test_each_official_field_of_a_part_works_or_is_refused_by_name(kind, ours, others):
    assert official_fields("openai.types.chat", f"ChatCompletion{kind}") - {*ours.model_fields} == {*others}
    for field, value in others.items():
        with pytest.raises(ValidationError, match=rf"{field}\n  Extra inputs"):
            ours.model_validate({field: value})


def test_the_docs_name_what_is_refused():
    page = (Path(modeling_vikdf.__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^\* Refused with 400: (.+?)^\* ", page, re.M | re.S)
    assert REFUSED.keys() <= {*re.findall(r"`(\w+)`", section)}


# ---- clients ----


def test_the_examples_of_the_openai_client(parts, pipe):
    openai = pytest.importorskip("openai")
    with listening(parts, api_key=SECRET) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0)
        asked = {"model": "vikdf", "messages": LONGER, "max_tokens": 12}
        ask = partial(client.chat.completions.create, **asked)
        expected = pipe(LONGER, max_new_tokens=12)[0]["generated_text"]
        several = ask(n=3, temperature=1.2, seed=4)
        assert len({choice.message.content for choice in several.choices}) > 1
        texts = ["", "", ""]
        for chunk in ask(n=3, temperature=1.2, seed=4, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in several.choices]
        assert chunk.usage == several.usage
        likely = ask(logprobs=True, top_logprobs=3).choices[0]
        assert likely.message.content == expected
        assert {len(entry.top_logprobs) for entry in likely.logprobs.content} == {3}
        with client.chat.completions.stream(**asked, logprobs=True) as stream:
            kinds = {event.type for event in stream}
            assert stream.current_completion_snapshot.choices[0].message.content == expected
        assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
        assert client.chat.completions.with_raw_response.create(**asked).parse().choices == ask().choices
        assert client.models.retrieve("vikdf").id == "vikdf"
        for field in ("tools", "response_format"):
            with pytest.raises(openai.BadRequestError, match=f"{field}: not supported by this server"):
                ask(**{field: REFUSED[field]})


def test_the_openai_client_that_does_not_block(parts, pipe):
    openai = pytest.importorskip("openai")

    async def ask(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            create = partial(client.chat.completions.create, model="vikdf", messages=LONGER, max_tokens=12)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in await create(stream=True)]
            whole = await asyncio.gather(*(create() for _ in range(3)))
            return ["".join(pieces), *(each.choices[0].message.content for each in whole)]

    with listening(parts) as url:
        assert asyncio.run(ask(url)) == [pipe(LONGER, max_new_tokens=12)[0]["generated_text"]] * 4


def test_langchain(parts, pipe, monkeypatch):
    langchain = pytest.importorskip("langchain_openai")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    expected = pipe(LONGER, max_new_tokens=12)[0]["generated_text"]
    shown = with_picture(data_url(picture("red")))
    of_the_picture = pipe("Look!", images=picture("red"), max_new_tokens=12)[0]["generated_text"]
    with listening(parts, api_key=SECRET) as url:
        asked = {"base_url": f"{url}/v1", "api_key": SECRET, "model": "vikdf", "max_tokens": 12, "max_retries": 0}
        chat = langchain.ChatOpenAI(**asked)
        reply = chat.invoke(LONGER)
        assert reply.content == expected and reply.usage_metadata["output_tokens"] == 12
        chunks = [*chat.stream(LONGER)]
        assert "".join(chunk.content for chunk in chunks) == expected and len(chunks) > 3
        assert [each.content for each in chat.batch([LONGER, LONGER, shown])] == [expected] * 2 + [of_the_picture]
        likely = chat.bind(logprobs=True, top_logprobs=2).invoke(LONGER).response_metadata["logprobs"]
        assert spelt(likely["content"]) == expected
        messages = pytest.importorskip("langchain_core.messages").convert_to_messages(LONGER)
        (found,) = langchain.ChatOpenAI(**asked, n=3, temperature=1.2).generate([messages]).generations
        assert len({each.text for each in found}) > 1


def test_litellm(parts, pipe, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for it
    litellm = pytest.importorskip("litellm")
    expected = pipe(LONGER, max_new_tokens=12)[0]["generated_text"]
    with listening(parts, api_key=SECRET) as url:
        ask = partial(litellm.completion, "openai/vikdf", LONGER, api_base=f"{url}/v1", api_key=SECRET, max_tokens=12)
        assert ask().choices[0].message.content == expected
        assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == expected
        assert len(ask(n=2, temperature=1.2).choices) == 2


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "60", "--noproxy", "*", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(which("curl") is None, reason="curl is not installed")
def test_curl(parts, pipe):
    expected = pipe(LONGER, max_new_tokens=12)[0]["generated_text"]
    ask = partial(curl, "--header", "Content-Type: application/json", "--header", f"Authorization: Bearer {SECRET}")
    with listening(parts, api_key=SECRET) as url:
        assert text_of(json.loads(ask(url + CHAT, "--data", json.dumps(body(LONGER, max_tokens=12))))) == expected
        streamed = ask(url + CHAT, "--no-buffer", "--data", json.dumps(body(LONGER, max_tokens=12, stream=True)))
        *lines, done, end = streamed.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
        assert json.loads(ask(f"{url}/v1/knowledge", "--data", json.dumps(body(LONGER))))["object"] == "knowledge"
        assert "API key" in json.loads(curl(f"{url}/v1/models"))["error"]["message"]
        assert curl(f"{url}/health", "--output", "/dev/null", "--write-out", "%{http_code}") == "200"
